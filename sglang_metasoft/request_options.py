"""What one request may set, from the same table as the server's settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sglang_metasoft.config import NO_COMPRESSION, NUMBER_LIMIT, is_int_from, setting, settings_of, shown


class RequestRefused(ValueError):
    """A request holds what it may not; the words are for its client (HTTP 400)."""


class RequestOptions:
    """What a client may set for one request, through ``custom_params`` or through HTTP headers."""

    FIELDS = {"metasoft_ratio": "ratio", "metasoft_budget": "budget", "metasoft_boundary": "boundary"}
    BOUNDARY = setting(
        None,
        flag=None,
        allowed="an integer >= 1, less than the prompt's tokens",
        check=is_int_from(1, NUMBER_LIMIT),
        help="Prompt tokens that other prompts share: they become a compressed segment of their own.",
    )

    @classmethod
    def field(cls, name: str) -> dataclasses.Field:
        """The setting behind a name of :attr:`FIELDS`."""
        return cls.BOUNDARY if name == "boundary" else settings_of()[name]

    @classmethod
    def allowed(cls, name: str) -> str:
        """The allowed values in words; where the server's 1 keeps every entry, a request's 1 does not compress."""
        allowed = cls.field(name).metadata["allowed"]
        return (
            allowed if name == "boundary" else f"{allowed.split(' (')[0]} ({NO_COMPRESSION} switches compression off)"
        )

    @classmethod
    def parse(cls, custom_params: Mapping[str, Any] | None) -> dict[str, Any]:
        """The settings that ``custom_params`` overrides, checked.

        Args:
            custom_params: the request's ``custom_params``; keys without the prefix ``metasoft_`` are not ours.

        Returns:
            Setting name to value; empty if nothing is overridden.

        Raises:
            RequestRefused: not a mapping, an unknown ``metasoft_`` key or a value out of range.
        """
        if custom_params is None:
            return {}
        if not isinstance(custom_params, Mapping):
            raise RequestRefused(f"custom_params: {shown(custom_params)} is not allowed; allowed: an object or null")
        options = {}
        for key, value in custom_params.items():
            if not (isinstance(key, str) and key.startswith("metasoft_")):
                continue
            if key not in cls.FIELDS:
                raise RequestRefused(f"custom_params: unknown key {shown(key)}; allowed: {', '.join(cls.FIELDS)}")
            name = cls.FIELDS[key]
            cls.check(name, value, f"custom_params: {key}={shown(value)}")
            options[name] = value
        if "ratio" in options and "budget" in options:
            raise RequestRefused(
                "custom_params: metasoft_ratio and metasoft_budget are both given; allowed: one of them"
            )
        return options

    @classmethod
    def beyond_prompt(cls, boundary: int, prompt_tokens: int) -> str:
        """The refusal of a boundary that is not inside the prompt."""
        return (
            f"custom_params: metasoft_boundary={boundary} is not allowed; allowed: "
            f"{cls.BOUNDARY.metadata['allowed']} ({prompt_tokens})"
        )

    @classmethod
    def check(cls, name: str, value: Any, given: str) -> None:
        """Raise RequestRefused, which starts with the words ``given``, unless ``value`` suits the setting."""
        if value is None or not cls.field(name).metadata["check"](value):
            raise RequestRefused(f"{given} is not allowed; allowed: {cls.allowed(name)}")
