"""DeepSpeed without what no run needs; in processes of their own, since it is about what they import."""

import subprocess
import sys

from tests.conftest import ROOT, free_port

BEGIN = """
import os, sys, torch
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
os.environ["MASTER_PORT"] = "{port}"
compile_ = torch.compile
import launcher.train.light
assert torch.compile is compile_
"""


def _alone(code: str) -> None:
    code = BEGIN.replace("{port}", str(free_port())) + code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_engine_needs_neither_the_compiler_nor_the_op() -> None:
    _alone("""
import deepspeed
model = torch.nn.Linear(4, 4)
ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
ds["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)[0]
engine.backward(engine(torch.ones(1, 4)).sum())
engine.step()
assert deepspeed.comm.comm.cdb.shm_comm_op is None
assert "torch._inductor.compile_fx" not in sys.modules
""")


def test_muon_is_compiled_when_it_makes_a_step() -> None:
    _alone("""
from deepspeed.runtime.zero.muon import original_muon
assert "torch._inductor.compile_fx" not in sys.modules
torch.compiler.set_stance("force_eager")  # The decorator is applied; a C++ compiler is not run.
torch.manual_seed(0)
update = original_muon.zeropower_via_newtonschulz5(torch.randn(16, 16), steps=10)
assert "torch._inductor.compile_fx" in sys.modules
singular = torch.linalg.svdvals(update.float())
assert 0.5 < singular.min() and singular.max() < 1.5, singular
""")
