"""Collects the replies that the ladder needs from the model and the rules, in batches."""

from __future__ import annotations

from collections.abc import Callable

from amp.generation.cache import Replies, Reply
from amp.generation.ladder import Ladder, Outcome, Request, dump_triplets
from amp.generation.makers import Makers
from amp.generation.progress import Counts
from amp.terminal import PlainConsole

STAGES = ("triplets", "rules", "states")


def ask_all(
    captions: list[str], ladder: Ladder, makers: Callable[[], Makers], replies: Replies, console: PlainConsole
) -> int:
    """Sends requests until every caption has an outcome or has failed. Returns the number of failed requests.

    Args:
        captions: Distinct captions, as returned by `readable`.
        ladder: Chooses the requests, and when the rules take over.
        makers: Returns the engine and the rules; called when a reply is needed.
        replies: Known replies. New ones are added.
        console: Where progress is shown.
    """
    lost: set[str] = set()
    waiting = captions
    counts = Counts(console)
    while True:
        requests: dict[tuple[str, int], dict[str, Request]] = {}
        still = []
        for caption in waiting:
            step = ladder.resolve(caption, replies.get)
            if isinstance(step, Outcome):
                counts.resolved(step, ladder.fell_back(step))
            elif step.key not in lost:
                requests.setdefault((step.stage, step.attempt), {})[step.key] = step
                still.append(caption)
        waiting = still
        if not requests:
            return len(lost)
        # Q1 with its retries, then the rules, then Q2, so that batches are full and share one prefix.
        stage, attempt = min(requests, key=lambda key: (STAGES.index(key[0]), key[1]))
        group = list(requests[stage, attempt].values())
        with console.progress("loading the engine"):  # returns at once if it is loaded
            engines = makers()
        if stage == "rules":
            _apply_rules(group, engines, replies, counts)
        else:
            lost |= _ask_model(group, ladder, engines, replies, counts)


def _apply_rules(group: list[Request], makers: Makers, replies: Replies, counts: Counts) -> None:
    assert makers.rules is not None, "the ladder uses the rules only if there are some"
    found = makers.rules.triplets(request.caption for request in group)
    with counts.replies("rules", 0, len(group)) as reply:
        for request, triplets in zip(group, found, strict=True):
            replies.put(request.key, Reply(dump_triplets(triplets)), stage="rules", caption=request.caption)
            reply()


def _ask_model(group: list[Request], ladder: Ladder, makers: Makers, replies: Replies, counts: Counts) -> set[str]:
    stage, attempt = group[0].stage, group[0].attempt
    engine, lost = makers.engine, set()
    assert engine is not None, "the ladder calls a model only if there is one"
    completions = engine.generate(
        ladder.prefix(stage),
        [request.suffix for request in group],
        # Only the rules' requests have no grammar.
        [request.grammar for request in group if request.grammar is not None] if engine.constrained else None,
        ladder.sampling(stage, attempt),
        [request.seed for request in group],
    )
    with counts.replies(stage, attempt, len(group)) as reply:
        for number, completion in completions:
            request = group[number]
            if completion.error and not completion.refused:
                lost.add(request.key)
            else:
                notes = {"stage": stage, "attempt": attempt, "caption": request.caption}
                notes |= {"tokens": completion.tokens, "prompt_tokens": completion.prompt_tokens}
                if completion.error:
                    notes["error"] = completion.error
                replies.put(request.key, Reply(completion.text, completion.refused), **notes)
            reply(completion.tokens, completion.error)
    return lost
