"""INFINITRAIN 34: published weights give the published model's logits, on one rank and on four.

The reference is a computation of its own, from the tensors and names of the files.
"""

from __future__ import annotations

import math

import gpt2
import initial_weights
import llama3
import numpy as np
import parallel
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from safetensors.torch import save_file

from tests.support.training import TINY, digest_of, digests_after, whole

GPT2 = gpt2.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, block_size=16)
LLAMA3 = llama3.Llama3Config(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_size=48, vocab_size=50, rope_factor=32.0
)
PADDING = 14  # rows
TOKENS = torch.arange(32).reshape(2, 16) * 7 % 50
GPT2_KINDS = {
    "ln_1.weight": (1,),
    "ln_1.bias": (1,),
    "attn.c_attn.weight": (1, 3),
    "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1),
    "attn.c_proj.bias": (1,),
    "ln_2.weight": (1,),
    "ln_2.bias": (1,),
    "mlp.c_fc.weight": (1, 4),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (4, 1),
    "mlp.c_proj.bias": (1,),
}
"""In the order of llm.c; as transformers has them, in widths of the model."""


def drawn(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def published_gpt2(config=GPT2):
    width = config.n_embd
    shapes = {"wte.weight": (config.vocab_size, width), "wpe.weight": (config.block_size, width)}
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{k}": tuple(n * width for n in ns) for k, ns in GPT2_KINDS.items()}
    return drawn({**shapes, "ln_f.weight": (width,), "ln_f.bias": (width,)})


def published_llama3():
    shapes = {"model.embed_tokens.weight": (50, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (32,)}
        shapes |= {f"{layer}.post_attention_layernorm.weight": (32,)}
        rows = {"q": 32, "k": 16, "v": 16, "o": 32}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (r, 32) for n, r in rows.items()}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (48, 32) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (32, 48)}
    return drawn({**shapes, "lm_head.weight": (50, 32)})


def write_llmc(path, tensors, version, dtype, config=GPT2):
    def written(name):
        tensor = tensors[name]
        return tensor.T if tensor.ndim == 2 and name.startswith("h.") else tensor

    padding = torch.full((PADDING, config.n_embd), 9.0)
    pieces = [tensors["wte.weight"], padding, tensors["wpe.weight"]]
    pieces += [written(f"h.{i}.{kind}") for kind in GPT2_KINDS for i in range(config.n_layer)]
    pieces += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    sizes = [config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd]
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, *sizes, config.vocab_size + PADDING]
    data = torch.cat([piece.reshape(-1) for piece in pieces]).to(dtype)
    path.write_bytes(header.tobytes() + data.view(torch.uint8).numpy().tobytes())


def attend(q, k, v):
    """Heads ``[batch, head, position, size]``."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32)


def gpt2_logits(tensors):
    x = tensors["wte.weight"][TOKENS] + tensors["wpe.weight"]
    for i in range(2):
        p = {kind: tensors[f"h.{i}.{kind}"] for kind in GPT2_KINDS}
        y = F.layer_norm(x, (32,), p["ln_1.weight"], p["ln_1.bias"])
        packed = y @ p["attn.c_attn.weight"] + p["attn.c_attn.bias"]
        heads = [part.view(2, 16, 4, 8).transpose(1, 2) for part in packed.split(32, -1)]
        x = x + attend(*heads) @ p["attn.c_proj.weight"] + p["attn.c_proj.bias"]
        y = F.layer_norm(x, (32,), p["ln_2.weight"], p["ln_2.bias"])
        y = y @ p["mlp.c_fc.weight"] + p["mlp.c_fc.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ p["mlp.c_proj.weight"] + p["mlp.c_proj.bias"]
    x = F.layer_norm(x, (32,), tensors["ln_f.weight"], tensors["ln_f.bias"])
    return x @ tensors["wte.weight"].T


def rotation(size):
    """``[position, size, size]``: one matrix for each position, pairs half a vector apart."""
    found = torch.zeros(16, size, size)
    for pair in range(size // 2):
        frequency = 500000.0 ** (-2 * pair / size)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192:
            frequency /= 32
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 32 + smooth * frequency
        a, b = pair, pair + size // 2
        for position in range(16):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            found[position, [a, a, b, b], [a, b, a, b]] = torch.tensor([cos, -sin, sin, cos])
    return found


def llama3_logits(tensors):
    def rms_norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    turn = rotation(8)
    x = tensors["model.embed_tokens.weight"][TOKENS]
    for i in range(2):
        p = {n.split(".", 3)[3]: t for n, t in tensors.items() if f"layers.{i}." in n}
        y = rms_norm(x, p["input_layernorm.weight"])
        q, k, v = (
            (y @ p[f"self_attn.{n}_proj.weight"].T).view(2, 16, -1, 8).transpose(1, 2)
            for n in "qkv"
        )
        q, k = (torch.einsum("pij,bhpj->bhpi", turn, part) for part in (q, k))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        x = x + attend(q, k, v) @ p["self_attn.o_proj.weight"].T
        y = rms_norm(x, p["post_attention_layernorm.weight"])
        gate = y @ p["mlp.gate_proj.weight"].T
        y = gate * gate.sigmoid() * (y @ p["mlp.up_proj.weight"].T)
        x = x + y @ p["mlp.down_proj.weight"].T
    return rms_norm(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def built(config, weights):
    model = config.build(range(config.n_layer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    return model


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_a_file_of_llm_c_gives_its_model(tmp_path, version, dtype):
    tensors = published_gpt2()
    write_llmc(tmp_path / "gpt2.bin", tensors, version, dtype)
    expected = gpt2_logits({name: tensor.to(dtype).float() for name, tensor in tensors.items()})

    logits = built(GPT2, initial_weights.LlmcWeights(tmp_path / "gpt2.bin", GPT2))(TOKENS)

    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_safetensors_give_gpt2(tmp_path):
    save_file(published_gpt2(), tmp_path / "model.safetensors")

    logits = built(GPT2, initial_weights.HuggingFaceWeights(tmp_path, n_head=4))(TOKENS)

    torch.testing.assert_close(logits, gpt2_logits(published_gpt2()), atol=1e-4, rtol=1e-5)


def test_safetensors_in_several_files_give_llama3(tmp_path):
    tensors = published_llama3()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in parts.items() for name in held}
    text = f'{{"weight_map": {str(index).replace(chr(39), chr(34))}}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)

    logits = built(LLAMA3, initial_weights.HuggingFaceWeights(tmp_path))(TOKENS)

    torch.testing.assert_close(logits, llama3_logits(tensors), atol=1e-4, rtol=1e-5)


def wrong_parts(config, weights):
    """Parameters of this rank, of four, that are not what the source holds."""
    layout = parallel.Layout(tensor_parallel=2, pipeline_parallel=2)
    model = parallel.ParallelModel(config, layout)
    model.fill(weights)
    wrong, names = [], []
    for stage in model.stages:
        for name, parameter in stage.named_parameters():
            names.append(name)
            if not torch.equal(whole(parameter), weights(name, parameter.shape)):
                wrong.append(name)
    return names, wrong


@pytest.mark.ranks
def test_four_ranks_load_the_same_weights(ranks, tmp_path):
    write_llmc(tmp_path / "gpt2.bin", published_gpt2(), 3, torch.float32)
    save_file(published_llama3(), tmp_path / "model.safetensors")
    for config, weights in (
        (GPT2, initial_weights.LlmcWeights(tmp_path / "gpt2.bin", GPT2)),
        (LLAMA3, initial_weights.HuggingFaceWeights(tmp_path)),
    ):
        found = ranks.run(wrong_parts, 4, config, weights)

        assert [wrong for _, wrong in found] == [[]] * 4
        names = {name for held, _ in found for name in held}
        assert names | {"lm_head.weight"} == {
            *(name for name, _ in config.build(range(2)).named_parameters()),
            "lm_head.weight",
        }


@pytest.mark.ranks
def test_the_flags_choose_the_file(ranks, tmp_path):
    tiny = gpt2.SIZES["tiny"]
    tensors = published_gpt2(tiny)
    save_file(tensors, tmp_path / "model.safetensors")
    write_llmc(tmp_path / "gpt2.bin", tensors, 3, torch.float32, tiny)
    command = f"{TINY} --pipeline_parallel 2 --num_iteration 1 --learning_rate 0"

    by_flag = [
        ranks.run(digests_after, 2, f"{command} {flag}")
        for flag in (f"--hf_weights {tmp_path}", f"--llmc_filepath {tmp_path}/gpt2.bin")
    ]

    expected = digest_of(tensors["wte.weight"])
    for first, last in by_flag:
        assert first["transformer.wte.weight"] == last["lm_head.weight"] == expected
    assert by_flag[0] == by_flag[1]  # moments too


def test_wrong_files_are_refused(tmp_path):
    write_llmc(tmp_path / "gpt2.bin", published_gpt2(), 3, torch.float32)
    data = (tmp_path / "gpt2.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:-4])
    (tmp_path / "other.bin").write_bytes(b"\0" * 2048)
    larger = gpt2.GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=50, block_size=16)

    with pytest.raises(initial_weights.WrongWeights, match="bytes, expected"):
        initial_weights.LlmcWeights(tmp_path / "cut.bin", GPT2)
    with pytest.raises(initial_weights.WrongWeights, match="expected a GPT-2 file"):
        initial_weights.LlmcWeights(tmp_path / "other.bin", GPT2)
    with pytest.raises(initial_weights.WrongWeights, match="n_layer is 2, the model's is 3"):
        initial_weights.LlmcWeights(tmp_path / "gpt2.bin", larger)
    with pytest.raises(initial_weights.WrongWeights, match="neither"):
        initial_weights.HuggingFaceWeights(tmp_path)
    save_file({"wte.weight": torch.zeros(3, 32)}, tmp_path / "model.safetensors")
    found = initial_weights.HuggingFaceWeights(tmp_path, n_head=4)
    with pytest.raises(
        initial_weights.WrongWeights, match=r"is \(3, 32\), the model's is \(50, 32\)"
    ):
        found("transformer.wte.weight", torch.Size((50, 32)))
    with pytest.raises(initial_weights.WrongWeights, match="has no"):
        found("transformer.wpe.weight", torch.Size((16, 32)))
