"""Says to whom an IP address leads: to anybody, or into the network or the node that a pod is in.

Every check of an endpoint, a redirect, a proxy or a tracker asks here. It does no I/O.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

# The last 32 bits of these are an address of IPv4: of NAT64, IPv4-compatible, and translated ones.
_WITH_IPV4 = tuple(map(IPv6Network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
# A network's own NAT64, whose addresses of IPv4 are anywhere in it, and site-local addresses.
_INTERNAL = tuple(map(IPv6Network, ("64:ff9b:1::/48", "fec0::/10")))
# Services of the platform that answer pods: the agents of Azure, Oracle and Alibaba, and Amazon's.
_OF_PLATFORM = frozenset(
    map(ip_address, ("168.63.129.16", "192.0.0.192", "100.100.100.200", "fd00:ec2::254", "fd00:ec2::23"))
)

_Address = IPv4Address | IPv6Address


def parse(text: str) -> _Address | None:
    """Returns an address, without its zone; an address of IPv4 within one of IPv6 is one of IPv4.
    None if the text isn't an address."""
    try:
        address = ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return _embedded(address) or address if isinstance(address, IPv6Address) else address


def is_public(text: str) -> bool:
    """Whether an address is one that anybody on the internet may have."""
    address = parse(text)
    if address is None or is_of_node(text) or any(address in network for network in _INTERNAL):
        return False
    return address.is_global and not address.is_multicast


def is_of_node(text: str) -> bool:
    """Whether an address is on the link of the node, or of a service that a platform offers to its
    machines, such as a cloud's metadata."""
    address = parse(text)
    return address is not None and (address.is_link_local or address in _OF_PLATFORM)


def is_of_machine(text: str) -> bool:
    """Whether an address is that of the pod itself."""
    address = parse(text)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _embedded(address: IPv6Address) -> IPv4Address | None:
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
    own = int(address) < 1 << 16  # :: and ::1 are addresses of IPv6
    if inner is None and not own and any(address in network for network in _WITH_IPV4):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return inner
