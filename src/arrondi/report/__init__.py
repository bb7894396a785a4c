"""Words and tables for people. Nothing here computes."""

from arrondi.report.adapters import print_merge, print_start
from arrondi.report.comparisons import print_comparison, print_methods
from arrondi.report.conversions import print_conversion, print_difference
from arrondi.report.folds import print_folds
from arrondi.report.networks import print_contents, print_network, print_network_evaluation, print_network_plan
from arrondi.report.outliers import print_outliers
from arrondi.report.progress import progress_bar
from arrondi.report.readers import sole_reader
from arrondi.report.tables import (
    print_bench,
    print_demo,
    print_evaluation,
    print_facts,
    print_inspection,
    print_plan,
    print_report,
)
from arrondi.report.traffic import print_traffic
from arrondi.report.verifications import print_verification

__all__ = [
    "print_bench",
    "print_comparison",
    "print_contents",
    "print_conversion",
    "print_demo",
    "print_difference",
    "print_evaluation",
    "print_facts",
    "print_folds",
    "print_inspection",
    "print_merge",
    "print_methods",
    "print_network",
    "print_network_evaluation",
    "print_network_plan",
    "print_outliers",
    "print_plan",
    "print_report",
    "print_start",
    "print_traffic",
    "print_verification",
    "progress_bar",
    "sole_reader",
]
