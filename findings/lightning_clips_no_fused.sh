#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: with precision="bf16-mixed" a fused optimizer may not be clipped.
#
# Trainer(gradient_clip_val=...) refuses optimizers that unscale gradients within their step, as those
# with fused=True do under a GradScaler. bf16-mixed has no scaler, so gradients are unscaled all along
# and could be clipped, as they are with precision="32-true"; the check looks at the optimizer alone.
#
# Seen:
#   32-true, fused=True: trains
#   bf16-mixed, fused=None: trains
#   bf16-mixed, fused=True: RuntimeError: The current optimizer, AdamW, does not allow for gradient clipping
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy lightning==2.6.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import lightning
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(lightning.LightningModule):
    def __init__(self, fused):
        super().__init__()
        self.layer, self.fused = torch.nn.Linear(4, 1), fused

    def training_step(self, batch, _):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=self.fused)


def fit(precision, fused):
    trainer = lightning.Trainer(
        max_steps=2,
        precision=precision,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Model(fused), torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
        found = "trains"
    except RuntimeError as error:
        found = f"RuntimeError: {str(error).split(' because')[0]}"
    print(f"{precision}, fused={fused}: {found}")
    return found


print("torch", torch.__version__, "lightning", lightning.__version__)
assert fit("32-true", True) == "trains"
assert fit("bf16-mixed", None) == "trains"
assert fit("bf16-mixed", True).startswith("RuntimeError"), "lightning has changed"
PYTHON
