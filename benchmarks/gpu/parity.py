"""A GPU's numbers beside the CPU's: scores and gradients of four families of backbones, in float32 and bf16;
then the tests of tests/gpu. The models and folders are those tests' own, so that both judge the same."""

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import torch
from torch import Tensor

from benchmarks.gpu.report import Report, failure
from benchmarks.gpu.task import ROOT, Task
from tests.tiny_folder import make_tiny_folder
from tests.tiny_model import make_tiny_model, move
from trainer.batch import Batch
from trainer.models.gensr.model import GenSR
from trainer.runtime.device import autocast, default_device, has_gpu

FAMILIES = ("scratch:nano", "scratch:t5gemma_nano", "scratch:llama_nano", "scratch:qwen3_nano")
# Training that is killed is part zero2; the benchmark is part speed; compiled layers are part compiled.
LEFT_OUT = "not killed and not benchmark and not compiled"


def scores_and_gradients(model: GenSR, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
    """Scores [B, C] and all gradients as one vector, float32 on the CPU."""
    model.zero_grad()
    with autocast(batch.candidates.device, precision):
        with torch.no_grad():
            scores = model.score(batch)
        loss, _ = model(batch)
    loss.backward()
    gradients = [p.grad.to_dense().float().flatten() for p in model.parameters() if p.grad is not None]
    return scores.float().cpu(), torch.cat(gradients).cpu()


def outcomes(log: str) -> dict[str, int]:
    """How many tests have passed, failed and so on, of `pytest -v` that may not have ended."""
    found = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.M)
    return {name.lower(): found.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}


def run(task: Task, report: Report) -> None:
    started_s, device = time.monotonic(), default_device()
    folder = make_tiny_folder(task.work / "tiny")
    for backbone in FAMILIES:
        family = backbone.removeprefix("scratch:").removesuffix("_nano").replace("nano", "t5")
        try:
            torch.manual_seed(0)
            model, batch = make_tiny_model(folder, f"model.backbone={backbone}", "model.dropout=0")
            batch = model.prepare(batch)
            scores, gradient = scores_and_gradients(model, batch, "fp32")
            batch = move(model, batch, device)
            for precision in ("fp32", "bf16"):
                other_scores, other = scores_and_gradients(model, batch, precision)
                error = float((other_scores - scores).abs().max())
                report.add(f"{family} {precision}: largest difference of a score", error)
                report.add(
                    f"{family} {precision}: difference of the gradient / its norm",
                    float((other - gradient).norm() / gradient.norm()),
                )
        except Exception as error:  # the other families go on
            report.note(family, failure(error))
    left_s = task.seconds - (time.monotonic() - started_s) - 3
    if not has_gpu():
        report.note("tests/gpu", "no GPU: the tests are read, and skip themselves")
    results = task.out / "parity-tests.xml"
    results.unlink(missing_ok=True)  # of an earlier session
    # -v: the log names every outcome at once, also when the time ends
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu", "-k", LEFT_OUT]
    command += [f"--junitxml={results}", "-o", "addopts="]
    try:
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "GENSR_TEST_GPU": "1"}, timeout=max(left_s, 1), check=False
        )
    except subprocess.TimeoutExpired:
        # pytest writes its results at the end: until then there is what this process and it have printed
        for outcome, number in outcomes((task.out / "parity.log").read_text(encoding="utf-8")).items():
            report.add(f"tests/gpu: {outcome}", number)
        report.note("tests/gpu", f"did not end in {left_s:.0f} s: see parity.log")
        return
    suite = next(ET.parse(results).getroot().iter("testsuite"))
    for name in ("tests", "failures", "errors", "skipped"):
        report.add(f"tests/gpu: {name}", float(suite.get(name, 0)))
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            report.note(f"failed: {case.get('name')}", "see parity.log")
