"""The Kubernetes manifests: valid by the published schemas, and with one policy for exit codes."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from cnnjax.cli.main import REQUEUE

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch"
MANIFESTS = ["jobset.yaml", "jobset-gpu.yaml", "jobset-tpu.yaml"]
# As Kubernetes writes them, in pkg/controller/job/pod_failure_policy.go.
EXIT_CODE = "Container train for pod default/cnnjax-hosts-0-1 failed with exit code {} matching FailJob rule at index 1"
CONDITION = "Pod default/cnnjax-hosts-0-1 has condition DisruptionTarget matching FailJob rule at index 2"


def load(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def job_of(manifest):
    (hosts,) = manifest["spec"]["replicatedJobs"]
    return hosts["template"]["spec"]


def strict(schema):
    """Returns a JSON schema that forbids unknown fields, as the API server does with --validate=strict."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: strict(part) for key, part in schema.items()}
    return closed | {"additionalProperties": False} if "properties" in closed and schema.get("type") else closed


@pytest.fixture(scope="module")
def validator():
    schema = strict(json.loads(Path(__file__).with_name("jobset.schema.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}  # The custom resource leaves it to Kubernetes.
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid_by_the_schema_of_jobset(name, validator):
    validator.validate(load(name))


def test_the_schema_refuses_wrong_names_types_and_choices(validator):
    changes = {
        "podFailurePolicies": lambda job: job.update(podFailurePolicies={}),
        "'2' is not of type 'integer'": lambda job: job.update(parallelism="2"),
        "'operator' is a required property": lambda job: job["podFailurePolicy"]["rules"][0]["onExitCodes"].pop(
            "operator"
        ),
        "claim": lambda job: job["template"]["spec"]["volumes"][0]["persistentVolumeClaim"].update(claim="shared"),
    }
    for message, change in changes.items():
        manifest = load("jobset.yaml")
        change(job_of(manifest))
        with pytest.raises(jsonschema.ValidationError, match=message):
            validator.validate(manifest)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_jobs_are_valid_by_the_schema_of_kubernetes(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "cnnjax"}, "spec": job_of(load(name))}
    kubernetes_validate.validate(job, "1.35", strict=True)


def decide(manifest, reason, message):
    """Returns the action of the first rule of the failure policy that matches, as the controller does."""
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_resuming_helps_restarts_all_pods_and_what_must_be_fixed_fails(name):
    manifest = load(name)
    job = job_of(manifest)
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    (container,) = job["template"]["spec"]["containers"]
    codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert [code["values"] for code in codes] == [[2], [REQUEUE]]
    assert {code["containerName"] for code in codes} == {container["name"]}
    assert job["backoffLimit"] == 0  # Other codes: the reason is BackoffLimitExceeded.
    restart = "RestartJobSetAndIgnoreMaxRestarts"
    assert decide(manifest, "PodFailurePolicy", EXIT_CODE.format(REQUEUE)) == restart
    assert decide(manifest, "PodFailurePolicy", CONDITION) == restart
    assert decide(manifest, "PodFailurePolicy", EXIT_CODE.format(2)) == "FailJobSet"
    assert decide(manifest, "BackoffLimitExceeded", "Job has reached the specified backoff limit") == "RestartJobSet"


@pytest.mark.parametrize("name", MANIFESTS)
def test_each_pod_knows_its_place_and_shares_its_files(name):
    manifest = load(name)
    job = job_of(manifest)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    words = container["command"] + container["args"]
    assert words[:2] == [".venv/bin/cnnjax", "train"]
    assert "--resume" in words
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for option in ("--run-dir", "--data-dir"):
        assert words[words.index(option) + 1].startswith(mounts[0] + "/")
    if name == "jobset-tpu.yaml":  # jax finds the other hosts by the variables of GKE.
        assert "env" not in container
        return
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"].startswith("$(COORDINATOR):")
    assert "job-completion-index" in variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    # Kubernetes expands only what stands before.
    assert list(variables).index("COORDINATOR") < list(variables).index("JAX_COORDINATOR_ADDRESS")
    assert manifest["spec"]["coordinator"]["replicatedJob"] == manifest["spec"]["replicatedJobs"][0]["name"]
