"""The command line. Imports are lazy: help and refusals must not wait for torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys

HELP = """\
usage: understudy VERB ...

One policy-gradient library for agents in environments and language models under a reward.

  understudy control ppo           --env ID    proximal policy optimisation: clip or KL penalty
  understudy control actor-critic  --env ID    online one-step, or n steps of many copies (A2C)
  understudy control reinforce     --env ID    whole episodes, with or without a baseline

  understudy language sft          --model DIR --data FILE   imitate completions, texts or chats
  understudy language reward-model --model DIR --data FILE   learn to score from pairs or labels
  understudy language ppo          --model DIR --data FILE --reward SPEC   PPO with a critic and a reference
  understudy language grpo         --model DIR --data FILE --reward SPEC   answers against each other; DAPO, GSPO, CISPO
  understudy language reinforce    --model DIR --data FILE --reward SPEC   RLOO, and other baselines
  understudy language dpo          --model DIR --data FILE   from preferences, without a reward model
  understudy rehearse                          all of RLHF on a small made-up language, no download

  understudy resume RUN                        go on where it stopped, to the bit; --steps M extends it
  understudy evaluate RUN                      fixed seeds, held-out prompts, intervals
  understudy generate RUN|DIR --prompt TEXT    let a language policy go on; --chat to talk to it
  understudy show RUN                          completions token by token, or an episode step by step
  understudy lineage RUN                       where this policy comes from; --verify recomputes every digest
  understudy compare RUN RUN ...               interquartile mean, interval, probability of improvement

Add --help to a verb for its flags; --version prints this program's. Start here:  understudy control ppo --env CartPole-v1
"""
TRAINING_VERBS = ("control", "language", "rehearse", "resume")
VERBS = (*TRAINING_VERBS, "evaluate", "generate", "show", "lineage", "compare")


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Returns:
        0 done, 1 failed, 2 the request was wrong, 130 stopped by SIGINT, 141 the reader of its output has ended, 143
        stopped by SIGTERM.
    """
    from understudy.run.config import RequestError
    from understudy.run.redact import printable, redact

    if (working_dir := os.getcwd()) not in sys.path:
        sys.path.append(working_dir)  # as `python -m` has it: a module of the current folder is found
    try:
        try:
            return _dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:  # it was closed before we began
                sys.stdout.flush()  # a reader that has ended is noticed here, not while Python ends
    except RequestError as error:
        print(f"understudy: {printable(redact(_format_error(error)))}", file=sys.stderr)
        return 1 if hasattr(error, "__notes__") else 2  # with notes, it ended a run that had begun
    except KeyboardInterrupt as error:
        print(f"understudy: {printable(_format_error(error, 'stopped'))}", file=sys.stderr)
        return 130
    except SystemExit as error:
        if hasattr(error, "__notes__"):  # a run that SIGTERM has ended
            print(f"understudy: {printable(_format_error(error, 'stopped'))}", file=sys.stderr)
        raise
    except (Exception, GeneratorExit) as error:  # said in a sentence; the traceback is in the run's events.jsonl
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            return 141
        if not hasattr(error, "__notes__") and (refusal := _size_refusal(error)) is not None:
            print(f"understudy: {printable(redact(refusal))}", file=sys.stderr)
            return 2
        from understudy.run.origin import user_error_location

        if not hasattr(error, "__notes__") and (place := user_error_location(error)):
            error.add_note(f"in {place}")  # outside a run, whose notes say it
        message = printable(redact(_format_error(error)))
        print(f"understudy: {type(error).__name__}: {message}", file=sys.stderr)
        return 1


def _format_error(error: BaseException, message: str | None = None) -> str:
    """An error's message on one line, with the notes that a run gave it."""
    text = str(error) if message is None else message
    return " ".join("; ".join(filter(None, [text, *getattr(error, "__notes__", ())])).split())


def _size_refusal(error: BaseException) -> str | None:
    """The refusal of a request that does not fit into memory or into a file name, wherever it was met; else None."""
    from understudy.run.guard import ran_out_of_memory

    text = " ".join(str(error).split())
    if ran_out_of_memory(error):
        match = re.search(r"you tried to allocate (\d+ bytes)", text)
        amount = f" ({match[1]} at once)" if match else ""
        return (
            f"memory ran out{amount}: lower the sizes asked for, such as hidden, num_envs, num_steps_per_env, "
            "completions_per_iteration or max_new_tokens"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:40]!r}... is too long for the name of a file: give a shorter one"
    return None


def _reader_has_ended() -> bool:
    """Whether output goes to a program that has ended, as `head` does; what is still to be written is then dropped."""
    has_ended = False
    for stream in (sys.stdout, sys.stderr):
        poller = select.poll()
        with contextlib.suppress(OSError):  # a stream without a descriptor
            poller.register(stream, 0)  # 0: errors alone, which are always told
            if poller.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                has_ended = True
    return has_ended


def _dispatch(argv: list[str]) -> int:
    if (
        not argv
        or argv[0] in ("-h", "--help", "help")
        or (argv[0] in VERBS[:2] and argv[1:] in ([], ["-h"], ["--help"]))
    ):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        from understudy.run.installation import version

        print(f"understudy {version()}")
        return 0
    from understudy.run.children import end_descendants_if_killed
    from understudy.run.installation import foreign_warning
    from understudy.run.redact import printable

    if (warning := foreign_warning()) is not None:
        print(f"understudy: warning: {printable(warning)}", file=sys.stderr)
    with end_descendants_if_killed() if argv[0] in TRAINING_VERBS else contextlib.nullcontext():
        return _run_verb(argv[0], argv[1:])


def _run_verb(verb: str, argv: list[str]) -> int:
    from understudy.run.config import RequestError, did_you_mean

    if verb == "control":
        from understudy.cli.control import train

        return train(argv)
    if verb == "language":
        from understudy.cli.language import train

        return train(argv)
    if verb == "rehearse":
        from understudy.cli.rehearse import rehearse

        return rehearse(argv)
    if verb == "resume":
        from understudy.cli.resume import resume_run

        return resume_run(argv)
    if verb == "generate":
        from understudy.cli.language import generate

        return generate(argv)
    if verb == "evaluate":
        return _evaluate(argv)
    if verb == "compare":
        return _compare(argv)
    if verb == "show":
        from understudy.cli.show import show

        return show(argv)
    if verb == "lineage":
        from understudy.cli.lineage import show

        return show(argv)
    raise RequestError(f"verb is {verb!r}: must be one of {', '.join(VERBS)}{did_you_mean(verb, VERBS)}")


def _evaluate(argv: list[str]) -> int:
    from pathlib import Path

    from understudy.cli.flags import asks_for_help
    from understudy.run.store import read_config, run_of_best

    path = next((Path(word) for word in argv if not word.startswith("-")), None)
    path = None if path is None else run_of_best(path)
    if path is None and asks_for_help(argv):
        from understudy.cli import control, language

        for world in (control, language):
            with contextlib.suppress(SystemExit):  # argparse ends after a help page
                world.evaluate_run(argv)
        return 0
    if path is not None and str(read_config(path).get("recipe", "")).startswith("language"):
        from understudy.cli.language import evaluate_run
    else:
        from understudy.cli.control import evaluate_run
    return evaluate_run(argv)


def _compare(argv: list[str]) -> int:
    import json
    from pathlib import Path

    from understudy.cli.flags import Parser
    from understudy.study.compare import format_table, group_runs

    parser = Parser(prog="understudy compare", description="Runs that differ in their seed only form a group.")
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    args = parser.parse(argv)
    run_groups = group_runs([Path(run) for run in args.runs])
    print(json.dumps(run_groups) if args.json else format_table(run_groups))
    return 0
