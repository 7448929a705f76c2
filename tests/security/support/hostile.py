"""Generates what a hostile pod, tenant or editor could write: texts, numbers, times and objects."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from finetune_api import names

TEXT = st.one_of(
    st.sampled_from([
        "😀", "\ud83d", "\x00", "\x1b[2J\x1b[31mroot", "a\r\nb", "\u202eevil", "\u2028", "\u0085", "\ufeff", "\uffff",
        "boom", "-1", "9" * 400, "1e999", "NaN", "garbage", "2026-13-45T99:99:99Z", "2026-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01", "{}", "[" * 3000, "x" * 5000, "",
    ]),
    st.text(st.characters(), max_size=40),
)  # fmt: skip
NUMBER: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([0, -1, 7, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 1e308, -1e308, 0.5, 2147483647, True]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
LEAF: st.SearchStrategy[Any] = st.one_of(TEXT, NUMBER, st.none())
VALUE: st.SearchStrategy[Any] = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)


def fields_of(model: Any, depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of a model's fields, each with a value of its own kind or of any."""
    from finetune_api.base import model_in

    def field(annotation: Any) -> st.SearchStrategy[Any]:
        nested = model_in(annotation)
        if nested is None or depth == 0:
            return VALUE
        inner = fields_of(nested, depth - 1)
        return st.one_of(inner, st.lists(inner, max_size=20), VALUE)

    return st.fixed_dictionaries(
        {}, optional={field_.alias or name: field(field_.annotation) for name, field_ in model.model_fields.items()}
    )


def _metadata(
    namespaces: tuple[str, ...], child_names: tuple[str, ...], uids: tuple[str, ...]
) -> st.SearchStrategy[Any]:
    labels = st.dictionaries(
        st.sampled_from([
            names.LABEL_JOB_UID, names.LABEL_ATTEMPT, names.LABEL_ROLE, "app.kubernetes.io/managed-by",
            "batch.kubernetes.io/job-completion-index", "x",
        ]),
        st.one_of(TEXT, st.sampled_from([*uids, "1", "2", "5000", "trainer", "finetune-operator"])),
        max_size=6,
    )  # fmt: skip
    owner = st.fixed_dictionaries({
        "kind": st.sampled_from(["FineTuneJob", "Job", "Deployment"]),
        "uid": st.sampled_from([*uids, "unknown"]),
        "name": st.sampled_from(["victim", "victim-1", "other", ""]),
        "controller": st.sampled_from([True, False, None]),
        "apiVersion": st.sampled_from([names.API_VERSION, "batch/v1", "evil/v1"]),
    })  # fmt: skip
    return st.fixed_dictionaries(
        {
            "namespace": st.sampled_from(namespaces),
            "name": st.one_of(st.sampled_from(child_names), TEXT),
            "uid": st.uuids().map(str),
            "resourceVersion": st.integers(min_value=1, max_value=10**6).map(str),
            "labels": st.one_of(labels, st.none()),
            "ownerReferences": st.lists(owner, max_size=2),
        },
        optional={
            "annotations": st.dictionaries(
                st.sampled_from([names.ANNOTATION_RESTARTS, names.ANNOTATION_AVOIDED_NODES]), TEXT
            ),
            "creationTimestamp": LEAF,
            "deletionTimestamp": LEAF,
        },
    )


def jobs(namespaces: tuple[str, ...], child_names: tuple[str, ...], uids: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Bodies of batch/v1 Jobs."""
    condition = st.fixed_dictionaries(
        {
            "type": st.sampled_from(["Complete", "Failed", "FailureTarget"]),
            "status": st.sampled_from(["True", "False"]),
        },
        optional={"reason": LEAF, "message": LEAF, "lastTransitionTime": LEAF},
    )
    return st.fixed_dictionaries(
        {"metadata": _metadata(namespaces, child_names, uids)},
        optional={
            "spec": st.one_of(st.fixed_dictionaries({}, optional={"completions": NUMBER, "suspend": LEAF}), st.none()),
            "status": st.fixed_dictionaries({}, optional={"conditions": st.lists(condition), "failed": LEAF}),
        },
    )


def pods(namespaces: tuple[str, ...], child_names: tuple[str, ...], uids: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Bodies of pods."""
    ended = st.fixed_dictionaries({}, optional={"exitCode": LEAF, "message": LEAF, "reason": LEAF, "finishedAt": LEAF})
    container = st.fixed_dictionaries(
        {"name": st.just("trainer")}, optional={"state": st.fixed_dictionaries({}, optional={"terminated": ended})}
    )
    status = st.fixed_dictionaries(
        {},
        optional={
            "phase": st.one_of(st.sampled_from(["Running", "Succeeded", "Failed"]), LEAF),
            "containerStatuses": st.lists(container, max_size=2),
            "podIPs": st.lists(st.fixed_dictionaries({"ip": TEXT}), max_size=2),
            "conditions": st.lists(st.fixed_dictionaries({"type": TEXT}, optional={"status": TEXT}), max_size=2),
        },
    )
    return st.fixed_dictionaries(
        {"metadata": _metadata(namespaces, child_names, uids)}, optional={"spec": st.none(), "status": status}
    )
