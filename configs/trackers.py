"""Whether the trackers that a run asks for can be of use, as far as this machine and its environment tell."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from configs.errors import ConfigError

WANDB = "https://api.wandb.ai"
SECONDS = 5.0
"""To reach a server."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing, or that has no key."""
    check_packages(trackers)
    check_keys(trackers)


def check_packages(trackers: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing."""
    for name in trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # or a folder that is called so
            raise ConfigError(
                f"monitor.trackers: {name} is not installed in this Python: `pip install {name}`, or leave it"
                " out: monitor.trackers=[tensorboard]"
            )


def check_keys(trackers: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that has no key."""
    if "wandb" in trackers and is_online() and not _has_key():
        raise ConfigError(
            f"monitor.trackers: wandb has no key for {_host()}: type `wandb login` (it goes to ~/.netrc), or"
            " set WANDB_API_KEY (for another server WANDB_BASE_URL, too); or WANDB_MODE=offline, which keeps"
            " all in the run's folder, for `wandb sync` later (docs/monitoring.md)"
        )


def check_network(trackers: Sequence[str]) -> None:
    """Raise ConfigError if a tracker's server cannot be reached from this machine. Where there is a proxy
    nobody knows."""
    if "wandb" not in trackers or not is_online() or _has_proxy():
        return
    server = urlsplit(_server())
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname or "", port), SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"monitor.trackers: wandb cannot reach {_host()} from here: {error.strerror or error}. Set"
            " WANDB_MODE=offline, which keeps all in the run's folder, for `wandb sync` later"
            " (docs/monitoring.md)"
        ) from None


def is_online() -> bool:
    """Whether wandb is to speak to its server."""
    return os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _has_proxy() -> bool:
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"))


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", WANDB)


def _host() -> str:
    """As ~/.netrc has it."""
    return urlsplit(_server()).netloc
