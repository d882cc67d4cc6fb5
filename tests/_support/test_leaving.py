"""The interpreter goes while threads of the model are at work: in order, soon, and without waiting for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_families import tiny_family
from tiny_models import tiny_model
from watched_decoding import run_alone

_PREPARE = """
import os, sys, threading, time, torch
from transformers import AutoModelForCausalLM
from remoe_adapt import get_remoe_model
torch.set_num_threads(1)
def load():
    model = get_remoe_model(AutoModelForCausalLM.from_pretrained({base!r}), "orin-8gb", {base!r} + "/family")
    model.generation_config.eos_token_id = None
    return model
ids = torch.tensor([[5, 17, 42, 8]])
def decode(model, tokens=200):
    return model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
def forever(*actions):
    def run(action):
        while True:
            action()
    for action in actions:
        threading.Thread(target=run, args=(action,), daemon=True).start()
def stepped(model):
    with torch.no_grad():
        model.controller.step()
        model(input_ids=ids)
"""

# Every child exits as any program does, at another moment of its threads' work.
_FORKS = """
model, other = load(), load()
def generating(): forever(lambda: decode(model), lambda: decode(model))
def two_models(): forever(lambda: decode(model), lambda: decode(other, 5))
def looping(): forever(lambda: stepped(model))
def turning(): forever(*[lambda s=s: model.controller.set_strength(s) for s in (0.3, 0.6)], lambda: decode(model))
for work in (generating, two_models, looping, turning):
    child = os.fork()
    if child == 0:
        model.controller.resume()
        work()
        time.sleep(0.1 + os.getpid() % 7 / 100)
        sys.exit(5)
    began = time.monotonic()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(work.__name__, ended, "late" if time.monotonic() - began > 20 else "soon")
"""

_STUCK = """
model = load()
stuck = threading.Event()
model.get_base_model().register_forward_hook(lambda *_: (stuck.set(), time.sleep(600)))
forever(lambda: decode(model))
assert stuck.wait(60)
import atexit
def late():  # before the package's own hook
    model.controller.set_strength(0.5)
    print("status", model.controller.status()["waiting"], flush=True)
atexit.register(late)
"""

_PATIENT = """
import atexit
def hook():  # runs after the package's own: it was there before
    worker.join()
    print("joined", flush=True)
atexit.register(hook)
"""

_JOINED = """
model = load()
model.controller.log_to({log!r})
model.controller.on_swap(lambda swap: print("heard", swap.after, flush=True))
def work():
    time.sleep(0.3)
    print("tokens", decode(model, 40).shape[1], flush=True)
    model.controller.set_strength(0.5)
threading.Thread(target=work).start()
"""


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("leaving") / "base"
    base: Any = tiny_model("qwen2_moe")
    base.save_pretrained(folder)
    tiny_family(base, folder / "family")
    return _PREPARE.format(base=str(folder))


def test_daemon_threads_at_work_do_not_abort_the_process(prepare: str, tmp_path: Path) -> None:
    ended = run_alone(tmp_path, "-W", "ignore", "-c", prepare + _FORKS)
    lines = ended.stdout.split("\n")[:-1]
    assert ended.returncode == 0 and len(lines) == 4, ended.stderr[-2000:]
    assert {line.split(" ", 1)[1] for line in lines} == {"5 soon"}, (lines, ended.stderr[-2000:])


def test_a_thread_that_reaches_no_boundary_costs_the_bound(prepare: str, tmp_path: Path) -> None:
    ended = run_alone(tmp_path, "-W", "ignore", "-c", prepare + _STUCK)
    assert ended.returncode == 0 and ended.stdout == "status True\n", ended.stderr[-2000:]


def test_a_later_hook_that_waits_for_a_thread_has_it_in_the_end(prepare: str, tmp_path: Path) -> None:
    script = f"{_PATIENT}\n{prepare}\nfrom remoe_adapt._support import process\nprocess.STAY_S = 1.5\nmodel = load()\n"
    script += "worker = threading.Thread(target=lambda: [decode(model, 20) for _ in range(20)], daemon=True)\n"
    script += "worker.start()\ntime.sleep(0.2)\n"
    ended = run_alone(tmp_path, "-W", "ignore", "-c", script)
    assert ended.returncode == 0 and ended.stdout == "joined\n", ended.stderr[-2000:]


def test_other_threads_end_their_work_and_logs_are_whole(prepare: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = run_alone(tmp_path, "-W", "ignore", "-c", prepare + _JOINED.format(log=str(log)))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout == "tokens 44\nheard 0.5\n" and '"after": 0.5' in log.read_text(encoding="utf-8")
