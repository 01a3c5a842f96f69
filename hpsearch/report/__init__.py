"""Figures of a study, drawn from plain values; they know neither journal nor tracker."""
