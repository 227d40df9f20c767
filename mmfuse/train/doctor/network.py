"""Which interface leads to node 0, and whether gloo and NCCL will use it."""

import os
import socket
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import NamedTuple

import psutil

from mmfuse.train.doctor.finding import Finding

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Network(NamedTuple):
    """Addresses as this machine knows them."""

    hostname: str
    own: tuple[str, ...]
    """What the hostname resolves to: where gloo listens, unless a variable says otherwise."""
    interfaces: Mapping[str, tuple[str, ...]]
    """Addresses by interface."""
    master: str
    """MAIN_PROCESS_IP, or MASTER_ADDR; empty on one node."""
    master_address: str
    """Empty where it does not resolve."""
    route: str
    """The own address from which packets to it leave; empty where none could."""
    chosen: Mapping[str, str]
    """Interfaces by the variable that names them."""


def see_network(environment: Mapping[str, str]) -> Network:
    """That of this machine."""
    master = environment.get("MAIN_PROCESS_IP") or environment.get("MASTER_ADDR") or ""
    master_address = next(iter(_resolve(master)), "") if master else ""
    return Network(
        hostname=socket.gethostname(),
        own=_resolve(socket.gethostname()),
        interfaces={
            name: tuple(
                address.address.partition("%")[0]
                for address in addresses
                if address.family in (socket.AF_INET, socket.AF_INET6)
            )
            for name, addresses in psutil.net_if_addrs().items()
        },
        master=master,
        master_address=master_address,
        route=_find_route(master_address) if master_address else "",
        chosen={name: environment[name] for name in _VARIABLES if environment.get(name)},
    )


def _resolve(host: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def _find_route(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def check_network(network: Network, *, num_machines: int) -> Iterator[Finding]:
    """Whether ranks on several nodes will find each other."""
    for variable, names in network.chosen.items():
        if not _choose(names, network.interfaces, variable=variable):
            there = ", ".join(network.interfaces)
            yield Finding(
                "problem", "network", f"{variable}={names}: no such interface", f"there are: {there}; or unset it"
            )
    if not network.master:
        if num_machines > 1:
            remedy = "set MAIN_PROCESS_IP to the address of node 0, on all nodes"
            yield Finding("problem", "network", f"NUM_MACHINES={num_machines}, but no MAIN_PROCESS_IP", remedy)
        else:
            yield Finding("ok", "network", "one node; set MAIN_PROCESS_IP and NUM_MACHINES to check the way to node 0")
        return
    said = (
        network.master if network.master == network.master_address else f"{network.master} ({network.master_address})"
    )
    if not network.master_address:
        yield Finding("problem", "network", f"{network.master}, of node 0, does not resolve", "give its IP address")
    elif not network.route:
        remedy = "give an address of node 0 in a network that this node is in"
        yield Finding("problem", "network", f"no route to node 0 at {said}", remedy)
    elif ip_address(network.route).is_loopback and num_machines > 1:
        # A name may be another address elsewhere.
        is_name, is_chosen = network.master != network.master_address, "GLOO_SOCKET_IFNAME" in network.chosen
        remedy = "give an address that other nodes reach"
        status = "warning" if is_name and is_chosen else "problem"
        yield Finding(status, "network", f"node 0 at {said}: only this node reaches that", remedy)
    else:
        yield from _check_interfaces(network, said=said)


def _check_interfaces(network: Network, *, said: str) -> Iterator[Finding]:
    """Whether messages go by the interface that leads to node 0."""
    leading = _find_interface(network.route, network.interfaces)
    where = f"{leading or 'an unknown interface'} ({network.route}) leads to node 0 at {said}"
    for variable, names in network.chosen.items():
        chosen = _choose(names, network.interfaces, variable=variable)
        if chosen and leading and leading not in chosen:
            yield Finding("warning", "network", f"{where}, but {variable}={names}", f"export {variable}={leading}")
    remedy = " ".join(["export", *(f"{name}={leading or 'INTERFACE'}" for name in _VARIABLES)])
    listens = network.own[0] if network.own else "127.0.0.1"  # gloo's choice where its name does not resolve
    is_right = listens == network.route or (leading and _find_interface(listens, network.interfaces) == leading)
    if "GLOO_SOCKET_IFNAME" in network.chosen or is_right:
        yield Finding("ok", "network", where)
    elif ip_address(listens).is_loopback and not ip_address(network.route).is_loopback:
        resolves = f"the hostname {network.hostname} " + ("is" if network.own else "does not resolve: gloo takes")
        found = f"{where}, but {resolves} {listens}: gloo would wait there, where no other node gets"
        yield Finding("problem", "network", found, remedy)
    else:
        found = f"{where}, but the hostname {network.hostname} is {listens}: gloo would use that"
        yield Finding("warning", "network", found, remedy)


def _find_interface(address: str, interfaces: Mapping[str, tuple[str, ...]]) -> str:
    """Empty where no interface has the address."""
    return next((name for name, addresses in interfaces.items() if address in addresses), "")


def _choose(names: str, interfaces: Mapping[str, object], *, variable: str) -> list[str]:
    """The interfaces that a variable stands for: NCCL takes prefixes, whole names after `=`, and others after `^`."""
    listed = names.lstrip("^=").split(",")
    if variable == "GLOO_SOCKET_IFNAME" or names.lstrip("^").startswith("="):
        matching = [name for name in interfaces if name in listed]
    else:
        matching = [name for name in interfaces if name.startswith(tuple(listed))]
    if names.startswith("^"):
        return [name for name in interfaces if name not in matching]
    return matching


def examine_network() -> Iterator[Finding]:
    """Findings about the way from here to node 0."""
    number = os.environ.get("NUM_MACHINES") or "1"
    if not number.isdecimal():
        yield Finding("problem", "network", f"NUM_MACHINES={number} is no number", "set it to the number of nodes")
        return
    yield from check_network(see_network(os.environ), num_machines=int(number))
