"""PyTorch's attention on the cases that attention.lua has measured, on the same GPU: one table of both

    python3 bench/gpu/peers.py build/bench-gpu.json [--flex] [--backends=cudnn,flash,efficient] [--only=REGEX]

Reads the cases (those whose name the expression finds), times PyTorch's back ends (cuDNN, flash, memory-efficient;
FlexAttention compiled, with --flex) the same way: medians by CUDA events, after a pause of 0.2 s and back to back. A back
end that cannot take a case is left out, and one whose output is not right on it is marked with a star. What the portable
kernels took, if build/bench-gpu-portable.json has it, stands beside. Writes what it measured into the same file.
"""
import json
import math
import os
import re
import sys
import time
import warnings

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as missing:
    sys.exit(f"peers: {missing}; PyTorch 2.6 or newer is needed")
if not torch.cuda.is_available():
    sys.exit("peers: PyTorch sees no GPU")

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
sdpa = torch.nn.functional.scaled_dot_product_attention


def lengths(batch, length):
    return [int(length / 8 + (length - length / 8) * b / max(1, batch - 1)) for b in range(batch)]


def predicate(case):
    """The mask as FlexAttention takes it; the same as in attention.lua, but for the bits of the random one."""
    kind, size = case["mask"], case["queries"]
    if kind == "causal":
        return lambda b, h, i, j: j <= i
    if kind == "window":
        return lambda b, h, i, j: (j <= i) & (i - j < 512)
    if kind == "documents":
        return lambda b, h, i, j: (j <= i) & (i * 8 // size == j * 8 // size)
    if kind == "padding":
        real = torch.tensor(lengths(case["batch"], size), device="cuda")
        return lambda b, h, i, j: (i < real[b]) & (j < real[b])
    if kind == "random":
        seen = torch.rand(size, case["keys"], device="cuda") < 0.5
        seen &= torch.rand(size, 1, device="cuda") < 0.9
        return lambda b, h, i, j: seen[i, j]
    return None


def dense(case, visible):
    if visible is None:
        return None
    batch = case["batch"] if case["mask"] == "padding" else 1
    b = torch.arange(batch, device="cuda").view(-1, 1, 1, 1)
    i = torch.arange(case["queries"], device="cuda").view(1, 1, -1, 1)
    j = torch.arange(case["keys"], device="cuda").view(1, 1, 1, -1)
    return visible(b, 0, i, j).expand(batch, 1, case["queries"], case["keys"]).contiguous()


def measure(fn, sustained):
    def timed(count):
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in marks:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in marks]

    def median(times):
        return sorted(times)[(len(times) - 1) // 2]

    timed(1)
    time.sleep(0.2)
    timed(3)
    result = {"burst": median([timed(1)[0] for _ in range(11)])}
    if sustained:
        count = max(10, min(400, math.ceil(5e5 / result["burst"])))
        result["sustained"] = median(timed(count)[count // 2:])
    return result


def right(out, truth, rows):
    """Whether some rows of the first head are what f32 arithmetic gives, dead rows included."""
    return bool(((out[0, 0, rows].float() - truth).abs() <= 0.02).all())


def truth_of(q, k, v, mask, rows):
    scores = q[0, 0, rows].float() @ k[0, 0].float().T / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[0, 0, rows], -math.inf)
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0) @ v[0, 0].float()


def time_case(case, sustained, flex, backends):
    torch.manual_seed(1)
    kind = {"dtype": DTYPES[case["dtype"]], "device": "cuda", "requires_grad": True}
    q = torch.randn(case["batch"], case["heads"], case["queries"], case["width"], **kind)
    k = torch.randn(case["batch"], case["key_heads"], case["keys"], case["width"], **kind)
    v = torch.randn(case["batch"], case["key_heads"], case["keys"], case["value_width"], **kind)
    dout = torch.randn(case["batch"], case["heads"], case["queries"], case["value_width"], dtype=kind["dtype"],
                       device="cuda")
    visible = predicate(case)
    mask = None if case["mask"] in ("full", "causal") else dense(case, visible)
    rows = torch.arange(0, case["queries"], max(1, case["queries"] // 64), device="cuda")
    shown = mask if mask is not None else dense(case, visible)
    with torch.no_grad():
        truth = truth_of(q, k, v, shown, rows)
    del shown
    options = {"attn_mask": mask, "is_causal": case["mask"] == "causal", "enable_gqa": case["heads"] != case["key_heads"]}
    runs = {name: (lambda: sdpa(q, k, v, **options), BACKENDS[name]) for name in backends}
    if flex and visible is not None and case["queries"] > 1:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        blocks = create_block_mask(visible, case["batch"] if case["mask"] == "padding" else None, None, case["queries"],
                                   case["keys"], device="cuda")
        torch._dynamo.reset()  # each case is compiled for itself; past a few, it would run uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)
        runs["flex"] = (lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=options["enable_gqa"]), None)
    results = {}
    for name, (run, backend) in runs.items():
        try:
            if backend is None:
                results[name] = time_run(run, q, k, v, dout, truth, rows, sustained, case)
            else:
                with sdpa_kernel(backend):
                    results[name] = time_run(run, q, k, v, dout, truth, rows, sustained, case)
        except Exception as refusal:  # a back end says in its own way that it does not take a case
            results[name] = {"refused": str(refusal).splitlines()[0][:100]}
            torch.cuda.empty_cache()
    return results


def time_run(run, q, k, v, dout, truth, rows, sustained, case):
    out = run()
    times = {"right": right(out.detach(), truth, rows)}
    with torch.no_grad():
        times["forward"] = measure(run, sustained)
    if not case.get("forward_only"):
        gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        times["right"] = times["right"] and all(bool(torch.isfinite(g).all()) for g in gradients)
        times["backward"] = measure(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), sustained)
    return times


def time_calls():
    """Microseconds of the host's time that a call on [1,8,64,64] takes on the quickest core, as in attention.lua."""
    q, k, v, dout = (torch.randn(1, 8, 64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(4))

    def forward():
        with torch.no_grad():
            sdpa(q, k, v)

    def both():
        torch.autograd.grad(sdpa(q, k, v), (q, k, v), dout)

    def per_call(fn, count=200):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(count):
                fn()
            times.append((time.perf_counter() - start) / count * 1e6)
            torch.cuda.synchronize()
        return sorted(times)[(len(times) - 1) // 2]

    def per_quick_call(fn):
        cores, least = os.sched_getaffinity(0), math.inf
        for core in cores:
            os.sched_setaffinity(0, {core})
            least = min(least, per_call(fn))
        os.sched_setaffinity(0, cores)
        return least

    forward(), both()
    return {"forward_us": per_quick_call(forward), "both_us": per_quick_call(both)}


def portable_cases(path):
    """The cases of the run with the portable kernels alone, by name."""
    path = path.replace(".json", "-portable.json")
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return {case["name"]: case for case in json.load(file)["results"] if "mask" in case}


def main(path, flex, backends, only):
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")  # a back end that declines a case says so once per reason
    with open(path) as file:
        bench = json.load(file)
    portable = portable_cases(path)
    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}")
    print(f"{'':34} {'':9} {'forward us: burst (x ours) sustained (x ours)':48} backward")
    for case in bench["results"]:
        if "mask" not in case or not re.search(only, case["name"]):
            continue
        case["peers"] = time_case(case, not bench["quick"], flex, backends)
        if case["name"] in portable:
            case["peers"]["portable"] = {way: portable[case["name"]][way] for way in ("forward", "backward")
                                         if way in portable[case["name"]]}
        for name, times in {"safeattn": case, **case["peers"]}.items():
            if "refused" in times:
                continue
            cells = []
            for way in ("forward", "backward"):
                for state in ("burst", "sustained"):
                    if way in times and state in times[way] and state in case[way]:
                        cells.append(f"{times[way][state]:9.1f} ({times[way][state] / case[way][state]:5.2f})")
            star = "" if times.get("right", True) else "*"
            print(f"{case['name']:34} {name + star:11} {'  '.join(cells)}", flush=True)
    for calls in (result for result in bench["results"] if result["name"] == "calls" and re.search(only, "calls")):
        calls["peers"] = {"torch": time_calls()}
        print("a call on [1,8,64,64], the host's us: forward, forward and backward")
        for name, us in {"safeattn": calls, **calls["peers"]}.items():
            print(f"{name:11} {us['forward_us']:6.1f} {us['both_us']:6.1f}")
    with open(path + ".new", "w") as file:
        json.dump(bench, file)
    os.replace(path + ".new", path)


def option(name, default):
    values = [word[len(name) + 3:] for word in sys.argv[2:] if word.startswith(f"--{name}=")]
    return values[-1] if values else default


if __name__ == "__main__":
    main(sys.argv[1], "--flex" in sys.argv[2:], option("backends", ",".join(BACKENDS)).split(","), option("only", ""))
