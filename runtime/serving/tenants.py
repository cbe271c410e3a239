"""Callers of several tenants: what is found by whom, and what none of them may do to the others."""

from .http.errors import ApiError
from .options import ServeOptions


def salt_of(options: ServeOptions, tenant: str, asked: str | None) -> str:
    """What a request's keys and values are found within: the salt that it asks for and, where there
    are several tenants, its tenant. No two pairs have the same."""
    if not options.has_tenants or options.tenants_share_prefixes:
        return asked or ""
    return f"{len(tenant)} {tenant} {asked or ''}"


def check_may_change(options: ServeOptions, what: str) -> None:
    """Raises ApiError 403 where one tenant would change what others use."""
    if options.has_tenants:
        raise ApiError(403, f"several tenants share this server, and {what}", "not_allowed")
