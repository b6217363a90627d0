"""Network namespaces and TUN devices by system calls alone: no tool has to be installed. Linux 5.14 or later.

A namespace lives as long as a process is in it or holds it open: when the router dies, however it dies, nothing is left
but the programs that run in its namespaces, and those have no network any more.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geopetals.wan.errors import WanError

DEVICE = "wan0"
MTU = 1500
TUN = Path("/dev/net/tun")
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO_ECN = 0x1, 0x2, 0x8
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCADDRT = 0x8922, 0x890B
_IFF_UP, _IFF_RUNNING, _RTF_UP = 0x1, 0x40, 0x1
_RTM_NEWLINK, _NLM_F_REQUEST, _NLM_F_ACK, _IFLA_TXQLEN = 16, 1, 4, 13
_NLMSGHDR, _IFINFOMSG, _RTATTR = struct.Struct("IHHII"), struct.Struct("BBHiII"), struct.Struct("HH")
_SO_NETNS_COOKIE = 71
_QUEUE_PACKETS = 5000

_HOW_TO_ALLOW = (
    "run it as root, in a container with --cap-add=SYS_ADMIN --cap-add=NET_ADMIN --device=/dev/net/tun, or allow "
    "unprivileged user namespaces"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A host's network: its namespace and the device through which all its packets come and go."""

    file: int
    tun: int
    identity: tuple[int, int]
    """Device and inode, as `stat` gives them for /proc/PID/ns/net; the kernel uses them again for later ones."""
    cookie: int
    """Never used again while the machine runs."""


def check_supported() -> None:
    """Raises WanError where there is no Linux, or one too old."""
    if sys.platform != "linux":
        raise WanError("networks are emulated by Linux: use a machine or a container that runs it.")
    try:
        _cookie()
    except OSError as error:
        raise WanError("this Linux is too old to tell namespaces apart for good: use 5.14 or later.") from error


def isolate() -> bool:
    """Leave the machine's network, by way of a user namespace if need be; tell whether there is one.

    In it the user keeps their uid and may make namespaces. The process must have one thread. Raises WanError.
    """
    if _unshare(_CLONE_NEWNET) == 0:
        return False
    uid, gid = os.geteuid(), os.getegid()
    failed = _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    if failed:
        raise WanError(f"this machine does not allow network namespaces ({os.strerror(failed)}): {_HOW_TO_ALLOW}.")
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        raise WanError(f"a user namespace cannot be set up ({error.strerror}): {_HOW_TO_ALLOW}.") from error
    return True


def create(address: str, prefix: int, *, routes: Sequence[tuple[str, int]] = ()) -> Namespace:
    """A new namespace with loopback and a device of this address; this process moves into it. Raises WanError."""
    failed = _unshare(_CLONE_NEWNET)
    if failed:
        raise WanError(f"a network namespace cannot be made ({os.strerror(failed)}): {_HOW_TO_ALLOW}.")
    tun = _open_tun()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set_up(control, "lo")
        _request(control, _SIOCSIFADDR, DEVICE, _address(address))
        _request(control, _SIOCSIFNETMASK, DEVICE, _address(_mask(prefix)))
        _request(control, _SIOCSIFMTU, DEVICE, struct.pack("i", MTU))
        _set_queue(_QUEUE_PACKETS)
        _set_up(control, DEVICE)
        for network, length in routes:
            _add_route(control, network, length)
    file = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(file)
    return Namespace(file=file, tun=tun, identity=(status.st_dev, status.st_ino), cookie=_cookie())


def set_segmentation(tun: int, *, whole: bool) -> None:
    """Whether the kernel hands over TCP data of up to 64 KB as one packet, or as it would go over a wire."""
    features = _TUN_F_CSUM | ((_TUN_F_TSO4 | _TUN_F_TSO_ECN) if whole else 0)
    fcntl.ioctl(tun, _TUNSETOFFLOAD, features)


def _cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def _open_tun() -> int:
    try:
        tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, PermissionError):
            mend = f"run it as root, or allow everybody to use it: chmod 666 {TUN}"
        else:
            mend = f"load the module (modprobe tun), or give the container --device={TUN}"
        raise WanError(f"{TUN} cannot be opened ({error.strerror}): {mend}.") from error
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    except OSError as error:
        os.close(tun)
        allowed = " it needs CAP_NET_ADMIN," if error.errno == errno.EPERM else ""
        raise WanError(f"a TUN device cannot be made ({error.strerror}):{allowed} {_HOW_TO_ALLOW}.") from error
    set_segmentation(tun, whole=True)
    return tun


def _set_up(control: socket.socket, device: str) -> None:
    _request(control, _SIOCSIFFLAGS, device, struct.pack("h", _IFF_UP | _IFF_RUNNING))


def _request(control: socket.socket, code: int, device: str, value: bytes) -> None:
    """An ioctl with a `struct ifreq`."""
    fcntl.ioctl(control, code, struct.pack("16s24s", device.encode(), value))


def _set_queue(packets: int) -> None:
    """By netlink: the ioctl for it is refused in user namespaces."""
    body = _IFINFOMSG.pack(0, 0, 0, socket.if_nametoindex(DEVICE), 0, 0)
    body += _RTATTR.pack(_RTATTR.size + 4, _IFLA_TXQLEN) + struct.pack("I", packets)
    head = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _RTM_NEWLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as route:
        route.send(head + body)
        failed = int.from_bytes(route.recv(4096)[_NLMSGHDR.size :][:4], sys.byteorder, signed=True)
    if failed:
        raise WanError(f"the queue of a TUN device cannot be set ({os.strerror(-failed)}): {_HOW_TO_ALLOW}.")


def _add_route(control: socket.socket, network: str, prefix: int) -> None:
    """`struct rtentry`: pad, three addresses, flags, pads, metric, device, MTU, window, irtt."""
    name = ctypes.create_string_buffer(DEVICE.encode())
    none = bytes(16)
    route = struct.pack(
        "@L16s16s16sHhLPhPLLH",
        0,
        _address(network),
        none,
        _address(_mask(prefix)),
        _RTF_UP,
        0,
        0,
        0,
        0,
        ctypes.addressof(name),
        0,
        0,
        0,
    )
    fcntl.ioctl(control, _SIOCADDRT, route)


def _address(address: str) -> bytes:
    """`struct sockaddr_in`."""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _mask(prefix: int) -> str:
    return socket.inet_ntoa((0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF).to_bytes(4))


def _unshare(flags: int) -> int:
    """0, or the error's number."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.unshare(flags) == 0 else ctypes.get_errno()
