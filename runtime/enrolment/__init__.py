"""Enrolment: normal samples become a recipe with its memory bank and operating point."""
