"""ztna.system_dns: what each way changes and takes back, and what answers show."""

from __future__ import annotations

import msgspec
import pytest

from ztna import system_dns
from ztna.dns import Code, Message, Record, Type
from ztna.names import Zone
from ztna.sections import Endpoint
from ztna.system_dns import (
    DNSMASQ_FILE,
    MANAGER_DNSMASQ_FILE,
    MANAGER_FILE,
    MARK,
    RESOLV_CONF,
    RESOLVED_FILE,
    Heard,
    How,
    Plan,
    Seen,
    SystemDnsError,
    Verdict,
)

ZONE = Zone("ztna.local")
DNSD = Endpoint("127.0.0.1", 5533)
FOREIGN = "nameserver 192.0.2.1\nsearch example.com\n"


def applied(seen: Seen, plan: Plan) -> Seen:
    files = dict(seen.files)
    for change in plan.changes:
        if change.text is None:
            del files[change.path]
        else:
            files[change.path] = change.text
    return Seen(files, seen.directories)


@pytest.mark.parametrize(
    ("how", "server", "files"),
    [
        (How.RESOLVED, DNSD, {RESOLVED_FILE: "[Resolve]\nDNS=127.0.0.1:5533\nDomains=~ztna.local\n"}),
        (
            How.MANAGER,
            DNSD,
            {
                MANAGER_FILE: "[main]\ndns=dnsmasq\n",
                MANAGER_DNSMASQ_FILE: "server=/ztna.local/127.0.0.1#5533\nrebind-domain-ok=/ztna.local/\n",
            },
        ),
        (
            How.DNSMASQ,
            DNSD,
            {DNSMASQ_FILE: "server=/ztna.local/127.0.0.1#5533\nrebind-domain-ok=/ztna.local/\n"},
        ),
        (How.RESOLV_CONF, Endpoint("127.0.0.2", 53), {}),
    ],
)
def test_what_is_installed_is_taken_back(how: How, server: Endpoint, files: dict[str, str]) -> None:
    seen = Seen({RESOLV_CONF: FOREIGN})
    plan = system_dns.install(seen, how, ZONE, server)
    after = applied(seen, plan)
    assert {path: text for path, text in after.files.items() if path != RESOLV_CONF} == {
        path: MARK + text for path, text in files.items()
    }
    assert system_dns.installed(seen) == () and system_dns.installed(after) == (how,)
    assert bool(plan.commands) == (how is not How.RESOLV_CONF)
    assert system_dns.install(after, how, ZONE, server) == Plan()
    back = system_dns.uninstall(after)
    assert back.commands == plan.commands and applied(after, back) == seen
    assert system_dns.uninstall(seen) == Plan()


def test_resolv_conf_asks_dnsd_first_and_only_on_port_53() -> None:
    seen = Seen({RESOLV_CONF: FOREIGN})
    after = applied(seen, system_dns.install(seen, How.RESOLV_CONF, ZONE, Endpoint("127.0.0.2", 53)))
    assert system_dns.nameservers(after.files[RESOLV_CONF]) == ("127.0.0.2", "192.0.2.1")
    moved = system_dns.install(after, How.RESOLV_CONF, ZONE, Endpoint("127.0.0.3", 53))
    assert system_dns.nameservers(applied(after, moved).files[RESOLV_CONF]) == ("127.0.0.3", "192.0.2.1")
    with pytest.raises(SystemDnsError, match="cannot name the port"):
        system_dns.install(seen, How.RESOLV_CONF, ZONE, DNSD)


def test_what_somebody_else_wrote_stays() -> None:
    seen = Seen({DNSMASQ_FILE: "server=/other/1.2.3.4\n"})
    with pytest.raises(SystemDnsError, match="did not write it"):
        system_dns.install(seen, How.DNSMASQ, ZONE, DNSD)
    assert system_dns.uninstall(seen) == Plan() and system_dns.installed(seen) == ()


@pytest.mark.parametrize(
    ("directories", "how"),
    [
        (("run/systemd/resolve", "run/NetworkManager"), How.RESOLVED),
        (("run/NetworkManager", "etc/dnsmasq.d"), How.MANAGER),
        (("etc/dnsmasq.d",), How.DNSMASQ),
        ((), How.RESOLV_CONF),
    ],
)
def test_who_resolves_names_is_found_out(directories: tuple[str, ...], how: How) -> None:
    assert system_dns.detect(Seen({}, frozenset(directories))) is how


def test_three_nameservers_are_asked() -> None:
    text = "# nameserver 1.1.1.1\nnameserver\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n" * 2
    assert system_dns.nameservers(text) == ("192.0.2.1", "192.0.2.2", "192.0.2.1")


def message(code: Code = Code.NOERROR, *answers: Record, authoritative: bool = False) -> Message:
    return Message(
        id=1, is_response=True, opcode=0, authoritative=authoritative, truncated=False, recursion_desired=True,
        code=code, questions=(), answers=answers, authority=(), additional=(), edns=None,
    )  # fmt: skip


FRESH = message(Code.NOERROR, Record("_fresh.ztna.local", Type.TXT, 1, 1, (b"1700000000",)))
NOBODY = message(Code.NXDOMAIN)
DIRECTLY = Heard(msgspec.structs.replace(NOBODY, authoritative=True), FRESH)


@pytest.mark.parametrize(
    ("directly", "by_host", "resolves", "verdict"),
    [
        (DIRECTLY, Heard(NOBODY, FRESH), False, Verdict.FINE),
        (DIRECTLY, Heard(None, FRESH), False, Verdict.FINE),
        (Heard(None, None), Heard(NOBODY, FRESH), False, Verdict.DNSD_SILENT),
        (Heard(message(Code.REFUSED), None), Heard(NOBODY, FRESH), False, Verdict.DNSD_WRONG),
        (Heard(NOBODY, FRESH), Heard(NOBODY, FRESH), False, Verdict.DNSD_WRONG),
        (DIRECTLY, Heard(FRESH, FRESH), False, Verdict.HIJACKED),
        (DIRECTLY, Heard(NOBODY, FRESH), True, Verdict.HIJACKED),
        (DIRECTLY, Heard(None, None), False, Verdict.TIMING_OUT),
        (DIRECTLY, Heard(NOBODY, NOBODY), False, Verdict.NOT_REGISTERED),
        (DIRECTLY, Heard(NOBODY, None), False, Verdict.NOT_REGISTERED),
    ],
)
def test_what_answers_show(directly: Heard, by_host: Heard, resolves: bool, verdict: Verdict) -> None:
    found, told = system_dns.judge(ZONE, directly, by_host, resolves_random=resolves)
    assert found is verdict and told
