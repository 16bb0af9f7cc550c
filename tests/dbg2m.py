import time
import torch.distributed as dist, torch
def nothing():
    a=time.time(); x=torch.ones(1); dist.all_reduce(x); b=time.time()
    s=dist.distributed_c10d._get_default_store().clone(); c=time.time()
    return a,b,c
