"""Declarations of streams and consumers in memory: completed, checked, and compared as JetStream does.

What a declaration leaves out is filled in, so that who compares what it declared with what it is told sees
what the real server tells: the metadata, for one, gets entries of the server's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from agentweave_bus.testing.memory_messages import ApiError
from agentweave_bus.testing.memory_subjects import overlap

__all__ = [
    "check_consumer_update",
    "check_queue_consumer",
    "check_stream_update",
    "consumer_config",
    "filters",
    "stream_config",
]

_NANOSECONDS: Final = 1_000_000_000
_NOT_HERE: Final = frozenset({"mirror", "sources", "subject_transform", "republish"})
_METADATA: Final = {"_nats.level": "5", "_nats.req.level": "0", "_nats.ver": "2.15.1"}
_STREAM: Final[dict[str, Any]] = {
    "retention": "limits",
    "max_consumers": -1,
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "discard": "old",
    "storage": "file",
    "num_replicas": 1,
    "compression": "none",
    "allow_direct": False,
    "mirror_direct": False,
    "sealed": False,
    "deny_delete": False,
    "deny_purge": False,
    "allow_rollup_hdrs": False,
    "consumer_limits": {},
    "allow_msg_ttl": False,
}
_STREAM_MORE: Final = frozenset({"name", "description", "subjects", "duplicate_window", "metadata", "no_ack"})
_STREAM_IF_TRUE: Final = frozenset({"discard_new_per_subject", "allow_msg_schedules"})
_DUPLICATE_WINDOW: Final = 120 * _NANOSECONDS
_CONSUMER: Final[dict[str, Any]] = {
    "deliver_policy": "all",
    "ack_policy": "none",
    "ack_wait": 30 * _NANOSECONDS,
    "max_deliver": -1,
    "replay_policy": "instant",
    "max_waiting": 512,
    "max_ack_pending": 1000,
    "num_replicas": 0,
}
_CONSUMER_MORE: Final = frozenset(
    {"name", "durable_name", "description", "metadata", "filter_subject", "filter_subjects", "backoff"}
    | {"opt_start_seq", "deliver_subject"}
)
_DELIVERED: Final = frozenset({"all", "new", "last", "by_start_sequence"})
_FIXED: Final = {
    "deliver_policy": "deliver policy",
    "opt_start_seq": "start sequence",
    "replay_policy": "replay policy",
    "max_waiting": "max waiting",
}


def stream_config(declared: dict[str, Any]) -> dict[str, Any]:
    """Return a stream's declaration as JetStream keeps it.

    Raises:
        ApiError: it holds what JetStream refuses, or what is not kept here.

    """
    if there := sorted(_NOT_HERE & declared.keys()):
        raise ApiError(501, 1, f"the in-memory broker has no {', '.join(there)}")
    _refuse_unknown(declared, _STREAM.keys() | _STREAM_MORE | _STREAM_IF_TRUE)
    config = {"subjects": [declared["name"]], **_completed(declared, _STREAM)}
    for name in _STREAM_IF_TRUE:
        if not config.get(name):
            config.pop(name, None)
    age = config["max_age"]
    config.setdefault("duplicate_window", min(age or _DUPLICATE_WINDOW, _DUPLICATE_WINDOW))
    if 0 < age < config["duplicate_window"]:
        raise ApiError(500, 10052, "duplicates window can not be larger then max age")
    _with_schedules(config)
    if config.get("discard_new_per_subject"):
        if config["discard"] != "new":
            raise ApiError(500, 10052, "discard new per subject requires discard new policy to be set")
        if config["max_msgs_per_subject"] <= 0:
            raise ApiError(500, 10052, "discard new per subject requires max msgs per subject > 0")
    return config


def _with_schedules(config: dict[str, Any]) -> None:
    """Add what message schedules bring with them."""
    if not config.get("allow_msg_schedules"):
        return
    if config["discard"] == "new":
        raise ApiError(500, 10052, "message scheduling cannot use discard new")
    if not config["allow_rollup_hdrs"]:
        config["allow_rollup_hdrs"], config["deny_purge"] = True, False


def check_stream_update(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check what may not change of a stream that is there. Raises ApiError."""
    refused = "stream configuration update can not"
    if old["retention"] != new["retention"] and "workqueue" in (old["retention"], new["retention"]):
        raise ApiError(500, 10052, f"{refused} change retention policy to/from workqueue")
    if old["storage"] != new["storage"]:
        raise ApiError(500, 10052, f"{refused} change storage type")
    if old["deny_delete"] and not new["deny_delete"]:
        raise ApiError(500, 10052, f"{refused} cancel deny message deletes")
    if old["deny_purge"] and not new["deny_purge"]:
        raise ApiError(500, 10052, f"{refused} cancel deny purge")
    if old.get("allow_msg_schedules") and not new.get("allow_msg_schedules"):
        raise ApiError(500, 10052, "message schedules can not be disabled")


def consumer_config(name: str, declared: dict[str, Any]) -> dict[str, Any]:
    """Return a consumer's declaration as JetStream keeps it.

    Raises:
        ApiError: it holds what JetStream refuses, or what is not kept here.

    """
    _refuse_unknown(declared, _CONSUMER.keys() | _CONSUMER_MORE)
    if declared.get("deliver_subject"):
        raise ApiError(501, 1, "the in-memory broker has pull consumers only")
    config = {"durable_name": name, "name": name, **_completed(declared, _CONSUMER)}
    if config["deliver_policy"] not in _DELIVERED or config["replay_policy"] != "instant":
        raise ApiError(501, 1, "the in-memory broker gives out by sequence, at once")
    if backoff := config.get("backoff"):
        if 0 < config["max_deliver"] <= len(backoff):
            raise ApiError(400, 10116, "max deliver is required to be > length of backoff values")
        config["ack_wait"] = backoff[0]
    return config


def check_consumer_update(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check what may not change of a consumer that is there. Raises ApiError."""
    for key, words in _FIXED.items():
        if old.get(key) != new.get(key):
            raise ApiError(500, 10012, f"{words} can not be updated")


def check_queue_consumer(config: dict[str, Any], others: Iterable[dict[str, Any]]) -> None:
    """Check a consumer of a work queue: each message is for one of them. Raises ApiError."""
    if config["ack_policy"] != "explicit":
        raise ApiError(400, 10084, "consumer in pull mode requires explicit ack policy on workqueue stream")
    if config["deliver_policy"] != "all":
        raise ApiError(400, 10101, "consumer must be deliver all on workqueue stream")
    mine = filters(config)
    for other in others:
        if mine == [">"]:
            raise ApiError(400, 10099, "multiple non-filtered consumers not allowed on workqueue stream")
        if any(overlap(one, theirs) for one in mine for theirs in filters(other)):
            raise ApiError(400, 10100, "filtered consumer not unique on workqueue stream")


def filters(config: dict[str, Any]) -> list[str]:
    """Return the subjects that a consumer is for."""
    return list(config.get("filter_subjects") or [config.get("filter_subject") or ">"])


def _completed(declared: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Add what is left out, and what is zero or empty where that means left out."""
    given = {key: value for key, value in declared.items() if value or value == defaults.get(key, value)}
    return {**defaults, **given, "metadata": {**_METADATA, **(declared.get("metadata") or {})}}


def _refuse_unknown(declared: dict[str, Any], known: Iterable[str]) -> None:
    for name in declared.keys() - set(known):
        raise ApiError(400, 10025, f'invalid JSON: json: unknown field "{name}"')
