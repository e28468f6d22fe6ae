#!/usr/bin/env bash
# safetensors 0.8.0: NumPy arrays whose values do not lie in a row are written wrong, without an error.
#
# 0.7.0 took `tensor.tobytes()`, which is in C order whatever the array's strides. 0.8.0 takes the
# address `tensor.ctypes.data` and looks at no strides (both in safetensors/numpy.py): a transposed
# array comes back in the other order, and one that steps over memory with what lies between. The
# docstring of both asks for contiguous tensors; safetensors.torch raises ValueError for others.
#
# Seen (numpy 2.4.6):
#   0.7.0 transposed as it was, every second as it was
#   0.8.0 transposed [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], every second [0.0, 1.0, 2.0]
#
# Exits with 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat > strided.py <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

arrays = {
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "every second": np.arange(6, dtype=np.float32)[::2],
}
save_file(arrays, "a.safetensors")
found = load_file("a.safetensors")
same = {name: np.array_equal(found[name], array) for name, array in arrays.items()}
said = [f"{name} {'as it was' if same[name] else found[name].tolist()}" for name in arrays]
print(safetensors.__version__, ", ".join(said))
assert set(same.values()) == {sys.argv[1] == "right"}
PYTHON
for one in "0.7.0 right" "0.8.0 wrong"; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "safetensors==${one% *}" numpy==2.4.6
  "$folder/venv/bin/python" strided.py "${one#* }"
done
