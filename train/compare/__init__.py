"""Arms × learning rates × seeds on one data set with one loop, and the report: `python -m grassland.train compare`."""

from .options import CompareOptions
from .plan import Comparison

__all__ = ["CompareOptions", "Comparison", "compare"]


def compare(options: CompareOptions) -> int:
    """Run what is not done yet and write the report; 1 if an arm has no result, else 0."""
    from .execute import Runner, processes
    from .presets import load_comparisons
    from .report import write_report

    plans = options.applied_to(load_comparisons(options.preset))
    out = options.folder
    if options.plan:
        print("\n".join(plan.describe() for plan in plans))
        if options.widen and any(len(plan.lrs) > 1 for plan in plans):
            print(f"An arm that is best at an end of its learning rates tries up to {options.widen} more.")
        return 0
    context = None if options.report_only else processes()
    runners = [Runner(plan, out / plan.name, context, options.jobs, options.widen) for plan in plans]
    records = [record for runner in runners for record in runner.records()]
    return write_report(records, out)
