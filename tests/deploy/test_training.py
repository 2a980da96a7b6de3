"""Training as a Job of several nodes: its manifests, and its containers run as processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import CHART, front, helm, of_kind, only, rendered, variables
from tests.oracle import make_base
from tests.training.processes import lose
from training.config import TrainConfig
from training.tree import read_tree

TWO = (
    "--set=training[0].name=big,training[0].nodes=2,training[0].output.claim=out,"
    "training[0].input.claim=in,training[0].config.data.train=/input/a.jsonl"
)
ROWS = [{"prompt": f"say {i}", "completion": f"word {i * 7}"} for i in range(40)]


def test_the_pods_of_a_run_find_each_other_and_only_each_other() -> None:
    made = rendered(TWO, "--set=training[0].processes=4,training[0].gpu=true")
    job = only(made, "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 2 * 3, "one that is lost takes the other with it"
    pod = spec["template"]["spec"]
    (service,) = (one for one in of_kind(made, "Service") if one != front(made))
    assert service["metadata"]["name"] == pod["subdomain"]
    told = yaml.safe_load(only(made, "ConfigMap")["data"]["accelerate.yaml"])
    assert told["main_process_ip"] == f"{name}-0.{pod['subdomain']}"
    assert (told["num_machines"], told["num_processes"]) == (2, 8)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    shared = {one["name"]: one.get("emptyDir") for one in pod["volumes"]}["shm"]
    assert shared["medium"] == "Memory"
    (policy,) = (one for one in of_kind(made, "NetworkPolicy") if one["metadata"]["name"] == name)
    own = {"podSelector": {"matchLabels": service["spec"]["selector"]}}
    assert policy["spec"]["ingress"] == [{"from": [own]}]
    assert policy["spec"]["egress"] == [{"to": [own]}]


def test_weights_are_cut_as_accelerate_is_told() -> None:
    example = str(CHART / "examples" / "training-nodes.yaml")
    made = rendered("--values", example)
    told = {
        one["metadata"]["name"]: yaml.safe_load(one["data"]["accelerate.yaml"])
        for one in of_kind(made, "ConfigMap")
    }
    copies, cut = told["nibble-train-tickets"], told["nibble-train-own-base"]
    assert (copies["distributed_type"], "main_process_ip" in copies) == ("MULTI_GPU", False)
    shipped = Path(__file__).parents[2] / "deploy" / "accelerate"
    fsdp = yaml.safe_load((shipped / "fsdp.yaml").read_text())
    assert {key: cut[key] for key in ("distributed_type", "fsdp_config", "mixed_precision")} == {
        key: fsdp[key] for key in ("distributed_type", "fsdp_config", "mixed_precision")
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("training[0].sharded=true", "for method.kind full"),
        ("training[0].nodes=1,training[0].sharded=true", "cuts the weights among nodes"),
        ("training[0].nodes=0", "training/0/nodes"),
    ],
)
def test_a_run_that_cannot_start_is_refused(values: str, said: str) -> None:
    done = helm("template", "nibble", str(CHART), TWO, f"--set={values}")
    assert done.returncode != 0
    assert said in done.stderr


def test_a_name_is_one_that_a_host_can_have() -> None:
    done = helm("template", "r" * 40, str(CHART), TWO, f"--set=training[0].name={'a' * 20}")
    assert done.returncode != 0
    assert "a host name has 63 characters" in done.stderr


class Pods:
    """The two pods of the run `big`, as processes here: paths below `root`, names this machine."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        for name in ("config", "input", "output", "data"):
            (root / name).mkdir(parents=True)
        (root / "input" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        steps = "training[0].config.optim.steps=200,training[0].config.optim.batch_size=5"
        method = "training[0].config.method.kind=lora,training[0].config.method.rank=2"
        every = "training[0].config.checkpoint_every=3"
        made = rendered(TWO, f"--set={steps},{method},{every},training[0].config.base={base}")
        job = only(made, "Job")
        (self.container,) = job["spec"]["template"]["spec"]["containers"]
        self.host = f"{job['metadata']['name']}-0.{job['metadata']['name']}"
        self.files = only(made, "ConfigMap")["data"]
        assert self.host in self.files["accelerate.yaml"]
        TrainConfig.model_validate(yaml.safe_load(self.files["run.yaml"]))

    @property
    def out(self) -> Path:
        return self.root / "output" / "big"

    def start(self) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, text in self.files.items():
            here = text.replace(self.host, "127.0.0.1").replace("29500", str(port))
            (self.root / "config" / name).write_text(self._here(here))
        return [self._start(index) for index in range(2)]

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        given = [*self.container["command"], *self.container["args"]]
        command = [
            self._here(part.replace("$(JOB_COMPLETION_INDEX)", str(index))) for part in given
        ]
        own: dict[str, Any] = {k: self._here(v) for k, v in variables(self.container).items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PATH": path}
        return subprocess.Popen(command, cwd=self.root / "data", env=env)

    def _here(self, text: str) -> str:
        """/config, /input, /output and /data are directories below `root`."""
        return re.sub(r"(?<![\w.-])/(config|input|output|data)\b", rf"{self.root}/\1", text)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_pods_train_together_and_go_on_when_one_is_lost(tmp_path: Path) -> None:
    base = make_base(tmp_path / "qwen3", "qwen3")
    whole = Pods(tmp_path / "whole", base)
    assert [pod.wait() for pod in whole.start()] == [0, 0]
    kept = read_tree(whole.out / "run" / "checkpoint.safetensors")["run"]
    assert len(kept["random"]) == 2, "two processes had a part in it"
    cut = Pods(tmp_path / "cut", base)
    pods = cut.start()
    log = cut.out / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 7):
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.01)
    lose(pods[1].pid)
    assert all(pod.wait() != 0 for pod in pods), "the other does not wait for ever"
    file = "adapter_model.safetensors"
    assert not (cut.out / file).exists()
    assert [pod.wait() for pod in cut.start()] == [0, 0]
    assert (cut.out / file).read_bytes() == (whole.out / file).read_bytes()
