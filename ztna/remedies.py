"""What to do about each reason of ztna/reasons.py, in a sentence: the CLI's last word. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ztna.reasons import Reason

REMEDIES: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.NO_CERTIFICATE: "set tls.certificate and tls.key: nobody comes in without a certificate",
        Reason.UNTRUSTED: "tls.ca of the other end must hold the authority that signed this certificate, which "
        "must be of the right kind (`ztna ca show`)",
        Reason.EXPIRED: "renew the certificate (`ztna ca renew`), and look at the clocks of both hosts",
        Reason.REVOKED: "issue a new certificate (`ztna ca issue`); this one is on the list of revoked ones",
        Reason.NO_GRANT: "issue a certificate that carries the grant: agent.<service>.ztna or "
        "connector.<service>.ztna",
        Reason.NO_SUCH_SERVICE: "look for it in `ztna leases list` and in the connector's routes: is it "
        "registered in Consul, with the tag ztna and an address?",
        Reason.NO_HEALTHY_CONNECTOR: "look at the connector's /status and the service's checks in Consul: no instance "
        "passes, or none of its connectors is connected to this relay",
        Reason.STALE_EPOCH: "resolve the name again: the service's lease has changed",
        Reason.NOT_YOUR_SESSION: "nothing: a message about a session came from somebody it does not belong to; see the "
        "relay's log for both names",
        Reason.LIMIT_REACHED: "close what is not needed, or raise the limit that the log names",
        Reason.POLICY_UNKNOWN: "see that the relay's resolvers answer and that dnsd reaches Consul "
        "(`dig TXT _fresh.<zone>`)",
        Reason.DRAINING: "wait, or use another relay: this one is going down",
        Reason.PEER_GONE: "see whether the other end runs and is reached: UDP and TCP to the relay's ports",
        Reason.CLOSED_BY_PEER: "nothing: the other end ended it on purpose",
        Reason.MALFORMED: "upgrade the older end, or find out who sends what is no message of ours",
    }
)
