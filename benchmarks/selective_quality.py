"""How well selective methods train: SST-2 and TREC on MiniLM, 1,000 examples each, beside full tuning and PEFT LoRA.

    python benchmarks/selective_quality.py --workers 2              # all runs, about an hour and a half on two cores
    python benchmarks/selective_quality.py --only full "head only"  # some of them; those that are done stay done
    python benchmarks/selective_quality.py --table                  # only write the table of what is done

Every finished run is one line of ``results/selective_quality.jsonl``, known by a digest of its recipe, task, seed and
sizes: whatever did not change is never run twice, and the command can be stopped and given again at any time. The table
in ``results/selective_quality.md`` is made of these lines. Methods with a budget train 0.5% of the base's numbers, the
others what their nature says; all run for the same epochs at the rate that the catalogue has for them.
"""

from __future__ import annotations

import sys

from quality_comparison import Comparison
from quality_contenders import ENTRANTS
from quality_table import page

COMPARISON = Comparison("selective_quality", ENTRANTS, 3, page)

if __name__ == "__main__":
    sys.exit(COMPARISON.main())
