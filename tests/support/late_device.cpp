// A device for torch that works late: its memory is host memory, and each of its streams is a
// thread that does what was queued in order, after a pause. Between streams nothing is in order but
// what an event says. So a copy that does not wait for what it must is seen in its bytes.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kStreams = 64;

class Stream {
 public:
  explicit Stream(unsigned seed) : random_(seed), thread_([this] { work(); }) { thread_.detach(); }

  void add(std::function<void()> job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
      ++added_;
    }
    changed_.notify_all();
  }
  uint64_t added() {
    std::lock_guard<std::mutex> lock(mutex_);
    return added_;
  }
  bool has_done(uint64_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_ >= count;
  }
  void wait_for(uint64_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= count; });
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return !jobs_.empty(); });
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(random_() % 400));
      job();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ++done_;
      }
      changed_.notify_all();
    }
  }

  std::mt19937 random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  uint64_t added_ = 0, done_ = 0;
  std::thread thread_;
};

Stream& stream_at(c10::StreamId id) {
  static Stream* streams[kStreams] = {};
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  auto& stream = streams[id % kStreams];
  if (stream == nullptr) stream = new Stream(static_cast<unsigned>(id));
  return *stream;
}

thread_local c10::StreamId current_id = 0;
Stream& current() { return stream_at(current_id); }

struct Event {
  c10::StreamId stream = 0;
  uint64_t count = 0;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream at(c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, {kType, 0}, id); }
  c10::Stream getStream(c10::Device) const override { return at(current_id); }
  c10::Stream getDefaultStream(c10::Device) const override { return at(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override {
    return getNewStream(d, 0);
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<int> next{0};
    return at(1 + next++ % (kStreams - 1));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto old = current_id;
    current_id = stream.id();
    return at(old);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = {stream.id(), stream_at(stream.id()).added()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    auto e = *static_cast<Event*>(event);
    stream_at(stream.id()).add([e] { stream_at(e.stream).wait_for(e.count); });
  }
  bool queryEvent(void* event) const override {
    auto e = *static_cast<Event*>(event);
    return stream_at(e.stream).has_done(e.count);
  }
  void synchronizeEvent(void* event) const override {
    auto e = *static_cast<Event*>(event);
    stream_at(e.stream).wait_for(e.count);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  bool queryStream(const c10::Stream& stream) const override {
    auto& s = stream_at(stream.id());
    return s.has_done(s.added());
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    auto& s = stream_at(stream.id());
    s.wait_for(s.added());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    for (int id = 0; id < kStreams; ++id) stream_at(id).wait_for(stream_at(id).added());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

std::mutex pinned_mutex;
std::set<std::pair<const char*, const char*>> pinned;

// What is given back is overwritten in the order of the stream that asked for it, as by the next
// owner that a caching allocator gives it to, and is never unmapped: who still reads it on another
// stream reads something wrong, and does not crash.
struct Block {
  void* data;
  size_t size;
  c10::StreamId stream;
};
void overwrite(void* context) {
  auto block = static_cast<Block*>(context);
  stream_at(block->stream).add([block] {
    std::memset(block->data, 0xff, block->size);
    delete block;
  });
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto data = std::malloc(n ? n : 1);
    return {data, new Block{data, n, current_id}, overwrite, c10::Device(kType, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto data = static_cast<char*>(std::malloc(n ? n : 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert({data, data + n});
    return {data, data, [](void*) {}, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(kType, &device_memory);

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto p = static_cast<const char*>(data);
  for (auto& [start, stop] : pinned)
    if (p >= start && p < stop) return true;
  return false;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
};

Hooks hooks;
[[maybe_unused]] const bool is_registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// Tensors of the same memory for the host's kernels.
at::Tensor on_host(const at::Tensor& t) {
  if (t.device().is_cpu()) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat>) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), std::nullopt);
}
at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype.value_or(at::kFloat));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  auto source = on_host(from), target = on_host(to);
  current().add([source, target] {
    at::AutoDispatchBelowADInplaceOrView guard;
    target.copy_(source);
  });
  auto& host = from.device().is_cpu() ? from : to;
  bool is_late = non_blocking && (!host.device().is_cpu() || is_pinned(host.data_ptr()));
  if (!is_late) current().wait_for(current().added());
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat>) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t bytes = self.numel() * self.itemsize();
  auto storage = impl->unsafe_storage();
  if (storage.nbytes() < bytes) {
    storage.set_data_ptr_noswap(device_memory.allocate(bytes));
    storage.set_nbytes(bytes);
  }
  return self;
}
at::Tensor copy_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resize(to, from.sym_sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Tensor& add_to(at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  auto target = on_host(self), term = on_host(other);
  current().add([=] {
    at::AutoDispatchBelowADInplaceOrView guard;
    target.add_(term, alpha);
  });
  return self;
}
at::Tensor& fill_with(at::Tensor& self, const at::Scalar& value) {
  auto target = on_host(self);
  current().add([=] {
    at::AutoDispatchBelowADInplaceOrView guard;
    target.fill_(value);
  });
  return self;
}
at::Tensor& fill_with_zero(at::Tensor& self) { return fill_with(self, 0); }
at::Scalar local_scalar(const at::Tensor& self) {
  current().wait_for(current().added());
  return on_host(self).item();
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("resize_", resize);
  m.impl("add_.Tensor", add_to);
  m.impl("fill_.Scalar", fill_with);
  m.impl("zero_", fill_with_zero);
  m.impl("_local_scalar_dense", local_scalar);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
