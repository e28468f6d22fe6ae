#!/usr/bin/env bash
# torch 2.13.0: under bfloat16 parameters AdamW's second moment never falls, whatever the gradients.
#
# It is kept in the parameter's type, and v*0.999 lies nearer to v than to the next smaller bfloat16, so
# that it is rounded back. A first phase of large gradients, as most training has, sets the
# denominator for good: when gradients have fallen to a hundredth, steps are 50 to 70 times too short,
# and 9,000 steps later they still are. It does not reach its value on the way up either, and stops at a
# place that depends on the implementation: fused has half of what foreach has, from the same numbers.
#
# Seen, after 1,000 gradients of 1, and after 9,000 more of 0.01:
#   exact: 0.6323 -> 0.0002
#   float32, fused=True: 0.6323 -> 0.0002
#   bfloat16, foreach=False: 0.5 -> 0.5
#   bfloat16, foreach=True: 0.5 -> 0.5
#   bfloat16, fused=True: 0.25 -> 0.25
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def second_moments(dtype, **how):
    """After the large gradients, and after the small ones."""
    param = torch.nn.Parameter(torch.zeros(64, dtype=dtype))
    opt = torch.optim.AdamW([param], **how)
    seen = []
    for gradient, steps in ((1.0, 1000), (0.01, 9000)):
        param.grad = torch.full_like(param, gradient)
        for _ in range(steps):
            opt.step()
        seen.append(opt.state[param]["exp_avg_sq"][0].item())
    return seen


print("torch", torch.__version__)
high = 1 - 0.999**1000
low = 0.999**9000 * high + (1 - 0.999**9000) * 1e-4
print(f"exact: {high:.4f} -> {low:.4f}")
for dtype, how in (
    (torch.float32, {"fused": True}),
    (torch.bfloat16, {"foreach": False}),
    (torch.bfloat16, {"foreach": True}),
    (torch.bfloat16, {"fused": True}),
):
    first, last = second_moments(dtype, **how)
    print(dtype, how, f"{first:.4g} -> {last:.4g}")
    if dtype == torch.float32:
        assert abs(first - high) < 1e-3 and abs(last - low) < 1e-5
    else:
        assert first == last > 0.2, "torch has changed"
PYTHON
