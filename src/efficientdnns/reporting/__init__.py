"""What people read: the page of a result, and several results beside each other."""

from efficientdnns.reporting.compare_page import compare_page, compare_table
from efficientdnns.reporting.comparison import Comparison, compare, read
from efficientdnns.reporting.html import write_page
from efficientdnns.reporting.report import report_page

__all__ = ["Comparison", "compare", "compare_page", "compare_table", "read", "report_page", "write_page"]
