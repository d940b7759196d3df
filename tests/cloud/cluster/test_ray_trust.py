"""Whether Ray's own traffic may cross the network: all clusters need a token, and those of several nodes TLS."""

from __future__ import annotations

import pytest

from isthmus.cloud.cluster.ray_tls import check_trust, uses_tls
from isthmus.common.errors import ConfigError

ONE, TWO = "10.0.0.1", "10.0.0.2"


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_USE_TLS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_one_node_needs_a_token_and_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"asks for no token, so whoever reaches its ports may run code"):
        check_trust([ONE])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_trust([ONE])
    check_trust([ONE, ONE])
    with pytest.raises(ConfigError, match="in the clear"):
        check_trust([ONE, TWO])


def test_several_nodes_without_tls_give_one_clear_line() -> None:
    with pytest.raises(ConfigError) as refused:
        check_trust([ONE, TWO])
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith("the cluster has several nodes, and Ray's token crosses the network between them in the cl")
    for name in ("RAY_USE_TLS=1", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT", "ray-certificate"):
        assert name in text


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_several_nodes_with_tls_need_a_token_too(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", value)
    assert uses_tls()
    with pytest.raises(ConfigError, match=r"asks for no token.*set RAY_AUTH_MODE=token"):
        check_trust([ONE, TWO])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_trust([ONE, TWO])


@pytest.mark.parametrize("value", ["", "0", "no", "2"])
def test_what_ray_does_not_take_for_tls_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_USE_TLS", value)
    assert not uses_tls()
    with pytest.raises(ConfigError, match="in the clear"):
        check_trust([ONE, TWO])


def test_a_cluster_that_grows_by_itself_needs_both_while_it_has_one_node_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"an --autoscaled cluster gets several nodes, and Ray's token crosses"):
        check_trust([ONE], autoscaled=True)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(ConfigError, match="Ray asks for no token"):
        check_trust([ONE], autoscaled=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_trust([ONE], autoscaled=True)
