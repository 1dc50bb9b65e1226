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
        if args.self_instruct:
            prompts = self_instructed(args, load)[: args.limit or None]
        else:
            prompts = data.read_prompts(args.prompts, every_turn=True, most=args.limit)
        rows = regenerate(args, prompts, load)
    answers = [m for row in rows for m in row.get("messages", [row]) if "finish_reason" in m]
    cut = sum(answer["finish_reason"] == "length" for answer in answers)
    print(f"{len(answers)} answers in {args.out}, of which {cut} are cut off at {args.max_new_tokens} tokens")


if __name__ == "__main__":
    run(main)
