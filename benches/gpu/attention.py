"""The attention calls of src/torch/attention.rs with their strides: which backend, right or wrong, how long the first call
of a new shape takes, and how long the next. Prints one line each."""
import time, torch, torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend as B
if not torch.cuda.is_available(): raise SystemExit("attention.py needs a GPU")
dev = "cuda"; KV, G, D = 4, 7, 128
print(torch.__version__, torch.backends.cudnn.version(), torch.cuda.get_device_name())
def served(x): return x.unsqueeze(1).expand(-1, G, -1, -1)
def make(T, grad):
    q = torch.randn(T, KV * G, D, device=dev, dtype=torch.bfloat16).transpose(0, 1)
    k, v = (torch.randn(T, KV, D, device=dev, dtype=torch.bfloat16).transpose(0, 1) for _ in "kv")
    return [x.requires_grad_(grad) for x in (q, k, v)]
def call(q, k, v, mask, causal): return F.scaled_dot_product_attention(q.unflatten(0, (KV, -1)), served(k), served(v), mask, 0.0, causal)
def err(a, b): return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
def timed(f):
    torch.cuda.synchronize(); t = time.perf_counter(); r = f(); torch.cuda.synchronize(); return r, (time.perf_counter() - t) * 1e3
backs = {"default": None, "cudnn": B.CUDNN_ATTENTION, "flash": B.FLASH_ATTENTION, "efficient": B.EFFICIENT_ATTENTION}
for kind in ("causal", "masked", "one"):
    for T in (97, 1025, 2049, 3000, 6017, 6018):
        for grad in (False, True):
            if kind == "one" and grad: continue
            q, k, v = make(T, grad); n = 417 if T > 500 else 40
            mask, causal = None, kind == "causal"
            if kind == "masked":  # the last n tokens are two answers, blind to each other
                own = torch.arange(n, device=dev) * 2 // n
                seen = (own[:, None] == own[None]).tril(); mask = torch.zeros(n, T, device=dev)
                mask[:, T - n:].masked_fill_(~seen, float("-inf")); mask = mask.bfloat16(); q = q.detach()[:, T - n:].requires_grad_(grad)
            if kind == "one": q = q[:, T - 1:]
            w = [x.detach().float().requires_grad_(grad) for x in (q, k, v)]
            with sdpa_kernel(B.MATH): ref = call(*w, None if mask is None else mask.float(), causal)
            go = torch.randn_like(ref)
            if grad: ref.backward(go)
            for name, b in backs.items():
                for x in (q, k, v): x.grad = None
                def run():
                    o = call(q, k, v, mask, causal)
                    if grad: o.backward(go.bfloat16())
                    return o
                try:
                    if b is None: o, first = timed(run); 
                    else:
                        with sdpa_kernel(b): o, first = timed(run)
                    e = [err(o.detach(), ref.detach())] + ([err(x.grad, y.grad) for x, y in zip((q, k, v), w)] if grad else [])
                    if b is None: _, again = timed(run)
                    else:
                        with sdpa_kernel(b): _, again = timed(run)
                    print(f"{kind:7}{T:6} grad={int(grad)} {name:10} first {first:8.2f} ms next {again:7.3f} ms err " + " ".join(f"{x:.1e}" for x in e) + ("  WRONG" if max(e) > 3e-2 or max(e) != max(e) else ""), flush=True)
                except Exception as x: print(f"{kind:7}{T:6} grad={int(grad)} {name:10} FAILS {str(x).splitlines()[0][:150]}", flush=True)
            del ref, w, q, k, v
# launch cost of one operation from C++ is near this, less Python's 1-2 us
a = torch.zeros(5, 128, device=dev, dtype=torch.bfloat16)
for _ in range(1000): a + a
torch.cuda.synchronize(); t = time.perf_counter()
for _ in range(20000): a + a
torch.cuda.synchronize(); print("one small kernel from Python:", (time.perf_counter() - t) / 20000 * 1e6, "us")
x = torch.randn(64, 152128, device=dev); _, ms = timed(lambda: x.cpu()); _, ms = timed(lambda: x.cpu()); print("64 rows of logits to the CPU:", ms, "ms")
_, ms = timed(lambda: x.topk(512)); _, ms = timed(lambda: x.topk(512)); print("topk 512 of 64 rows:", ms, "ms")
