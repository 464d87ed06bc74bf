"""At the end of the story everything is taken away."""

import pytest

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import NAMESPACE, RELEASE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_after_uninstalling_nothing_is_left(kubernetes: Kubernetes, release: str):
    kubernetes.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", timeout_s=300)
    kubernetes.until(lambda: not kubernetes.left(NAMESPACE), "the namespace is empty", seconds=180, namespace=NAMESPACE)
