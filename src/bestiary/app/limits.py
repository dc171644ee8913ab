"""Limits for each address: open orders, and guesses of the password."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Scope

FIRST_FAILURES = 3  # each costs FIRST_SECONDS; every later one doubles the wait
FIRST_SECONDS = 1.0
MAX_SECONDS = 60.0
FORGET_SECONDS = 900.0  # after this time, failures no longer count
MAX_ADDRESSES = 10_000  # number of addresses whose failures are stored


def address_of(scope: Scope) -> str:
    """The address that a request came from. For IPv6 it is the network, because one person has 2**64 addresses.

    >>> address_of({"client": ("192.0.2.7", 5000)}), address_of({"client": ("2001:db8::1", 5000)})
    ('192.0.2.7', '2001:db8::/64')
    """
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


@dataclass
class Failures:
    """The wrong passwords of one address: how many, the time of the last, and when the next guess is judged."""

    count: int
    last: float
    next_guess: float


class Guesses:
    """Slows down password guessing: until an address has waited, its guesses are rejected without being compared."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, Failures] = OrderedDict()  # the address that failed last comes last

    def seconds_to_wait(self, address: str) -> float:
        """Seconds until a password from this address is compared again; 0 for now."""
        failures = self._failures.get(address)
        return max(0.0, failures.next_guess - self._clock()) if failures else 0.0

    def failed(self, address: str) -> float:
        """Count a wrong password. Returns the seconds until the next one is compared."""
        now = self._clock()
        before = self._failures.pop(address, None)
        count = 1 + (before.count if before and now - before.last < FORGET_SECONDS else 0)
        seconds = min(MAX_SECONDS, FIRST_SECONDS * 2.0 ** min(max(0, count - FIRST_FAILURES), 20))
        self._failures[address] = Failures(count, now, now + seconds)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        return seconds
