"""The TLS context for Consul's https: its authorities, our client certificate, made anew when their files change."""

from __future__ import annotations

import ssl

from ztna.config import ConsulConfig
from ztna.errors import ConfigError
from ztna.telemetry import logger
from ztna.watching import Stamp, stamp

_log = logger(__name__)


class TlsFiles:
    """Keeps the last context that could be made: certificate and key are two files, written one after the other."""

    def __init__(self, config: ConsulConfig) -> None:
        """Read the files. Raises ConfigError naming those that cannot be used."""
        self._config = config
        self._seen = self._stamps()
        self._context = tls_context(config)
        self._problem: str | None = None

    def current(self) -> ssl.SSLContext:
        """Return the context for the next request; another one whenever the files hold something else."""
        seen = self._stamps()
        if seen != self._seen:
            try:
                self._context = tls_context(self._config)
            except ConfigError as error:
                if str(error) != self._problem:
                    _log.warning("consul_tls_kept", error=error)
                self._problem = str(error)
            else:
                _log.info("consul_tls_renewed")
                self._seen, self._problem = seen, None
        return self._context

    def _stamps(self) -> tuple[Stamp, ...]:
        config = self._config
        return tuple(stamp(path) for path in (config.ca, config.certificate, config.key) if path is not None)


def tls_context(config: ConsulConfig) -> ssl.SSLContext:
    """Return a verifying context with the CA and the client certificate of the configuration. Raises ConfigError."""
    try:
        context = ssl.create_default_context(cafile=config.ca)
    except OSError as error:
        raise ConfigError(f"consul.ca: cannot use {config.ca}: {error}") from error
    if config.certificate is not None:
        try:
            context.load_cert_chain(config.certificate, config.key)
        except OSError as error:
            raise ConfigError(f"consul.certificate, consul.key: cannot use them: {error}") from error
    return context
