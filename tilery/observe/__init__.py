"""What the running system says about itself: metrics today, lifecycle timing and traces with them.

Used by every layer, imports none of them: values come in as plain numbers and mappings.
May be imported from here: `metrics.ServingMetrics`.
"""
