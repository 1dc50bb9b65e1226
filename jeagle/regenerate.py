"""`python -m jeagle.regenerate` generates the target's own answers to prompts, which the target can write too.

A draft learns best from on-policy data, which are the answers that its target generates. Every answer is saved as soon
as it is finished, so that an interrupted run continues where it was. The finished file is sorted, and the settings
that it was made from are written beside it.
"""

from jeagle import data
from jeagle.run.answers import RegenerateArguments, answer_settings, regenerate, self_instructed, target_loader
from jeagle.runtime.cli import parse, run
from jeagle.runtime.host import prepare_host


def main(arguments: list[str]) -> None:
    args = parse(RegenerateArguments, arguments, program="python -m jeagle.regenerate")
    prepare_host(devices=not args.server)
    load = target_loader(args)
    with data.AnswerFile(args.out, answer_settings(args)).alone():
        prompts = self_instructed(args, load) if args.self_instruct else data.read_prompts(args.prompts)
        rows = regenerate(args, prompts[: args.limit or None], load)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    print(f"{len(rows)} answers in {args.out}, of which {cut} are cut off at {args.max_new_tokens} tokens")


if __name__ == "__main__":
    run(main)
