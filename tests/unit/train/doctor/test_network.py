"""The way to node 0: where it cannot be gone, or gloo and NCCL would take another, and what to export."""

import pytest

from mmfuse.train.doctor.finding import Finding
from mmfuse.train.doctor.network import Network, check_network, see_network

INTERFACES = {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.2", "fe80::2"), "ib0": ("10.1.0.2",)}
GOOD = Network("node2", ("10.0.0.2",), INTERFACES, "10.0.0.1", "10.0.0.1", "10.0.0.2", {})
EXPORT = "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"


def check(network: Network, *, num_machines: int = 2) -> list[Finding]:
    return list(check_network(network, num_machines=num_machines))


def test_the_interface_that_leads_to_node_0_is_named() -> None:
    assert check(GOOD) == [("ok", "network", "eth0 (10.0.0.2) leads to node 0 at 10.0.0.1", "")]
    assert check(GOOD._replace(own=("fe80::2",)))[0].status == "ok"  # another address of the same


@pytest.mark.parametrize(
    ("own", "status", "said"),
    [
        (("127.0.1.1",), "problem", "the hostname node2 is 127.0.1.1: gloo would wait there"),
        ((), "problem", "the hostname node2 does not resolve: gloo takes 127.0.0.1: gloo would wait there"),
        (("10.1.0.2",), "warning", "the hostname node2 is 10.1.0.2: gloo would use that"),
    ],
)
def test_a_hostname_that_is_another_address_needs_the_two_variables(
    own: tuple[str, ...], status: str, said: str
) -> None:
    (finding,) = check(GOOD._replace(own=own))
    assert finding.status == status and said in finding.found and finding.remedy == EXPORT
    (finding,) = check(GOOD._replace(own=own, chosen={"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"}))
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("variable", "names", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "eth", "problem"),  # gloo takes whole names
        ("GLOO_SOCKET_IFNAME", "ib0", "warning"),
        ("NCCL_SOCKET_IFNAME", "eth", None),
        ("NCCL_SOCKET_IFNAME", "=eth", "problem"),
        ("NCCL_SOCKET_IFNAME", "=ib0,eth0", None),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", None),
        ("NCCL_SOCKET_IFNAME", "^eth", "warning"),
        ("NCCL_SOCKET_IFNAME", "enp", "problem"),
    ],
)
def test_a_variable_that_names_no_interface_is_a_problem_and_another_one_than_the_route_s_a_warning(
    variable: str, names: str, status: str | None
) -> None:
    wrong = [finding for finding in check(GOOD._replace(chosen={variable: names})) if finding.status != "ok"]
    assert [finding.status for finding in wrong] == ([status] if status else [])
    assert not wrong or f"{variable}={names}" in wrong[0].found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"master": "node1", "master_address": "", "route": ""}, "node1, of node 0, does not resolve"),
        ({"route": ""}, "no route to node 0 at 10.0.0.1"),
        ({"master": "127.0.0.1", "master_address": "127.0.0.1", "route": "127.0.0.1"}, "only this node reaches that"),
        ({"master": "", "master_address": "", "route": ""}, "NUM_MACHINES=2, but no MAIN_PROCESS_IP"),
    ],
)
def test_no_way_to_node_0_is_a_problem(change: dict[str, str], said: str) -> None:
    (finding,) = check(GOOD._replace(**change))
    assert finding.status == "problem" and said in finding.found and finding.remedy


def test_node_0_may_know_its_own_name_as_loopback_if_gloo_is_told_its_interface() -> None:
    named = GOOD._replace(master="node1", master_address="127.0.1.1", route="127.0.0.1", own=("127.0.1.1",))
    assert [finding.status for finding in check(named)] == ["problem"]
    assert [finding.status for finding in check(named._replace(chosen={"GLOO_SOCKET_IFNAME": "eth0"}))] == ["warning"]


def test_one_node_needs_no_way() -> None:
    alone = GOOD._replace(own=("127.0.0.1",), master="", master_address="", route="")
    assert [finding.status for finding in check(alone, num_machines=1)] == ["ok"]
    meets = alone._replace(master="127.0.0.1", master_address="127.0.0.1", route="127.0.0.1")
    assert [finding.status for finding in check(meets, num_machines=1)] == ["ok"]


def test_this_machine_s_addresses_are_seen() -> None:
    seen = see_network({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": ""})
    assert (seen.master, seen.master_address, seen.route) == ("127.0.0.1", "127.0.0.1", "127.0.0.1")
    assert "127.0.0.1" in seen.interfaces["lo"] and seen.chosen == {"GLOO_SOCKET_IFNAME": "lo"}
    gone = see_network({"MAIN_PROCESS_IP": "no.such.host.invalid", "MASTER_ADDR": "127.0.0.1"})
    assert (gone.master, gone.master_address, gone.route) == ("no.such.host.invalid", "", "")
