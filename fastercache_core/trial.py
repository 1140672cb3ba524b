"""What reused features are worth: now and then a computed evaluation is run once more with them."""
# The second trial comes so many evaluations after the first, and the waits grow by that factor: a trial costs what
# a reused pass does, and errors change slowly.
WAIT, LATER = 6, 3
# Kinds of features that leave out more than half of a pass, see `nodes.host.families.KINDS`.
DEEP = {"stack", "deep"}


class Trial:
    """Trials of reused features during one run, and what they showed."""

    def __init__(self):
        self.reset()

    def reset(self):
        """Forget everything, so that the next trial is due at once."""
        self.wait, self.next = WAIT, 0
        self.error = None   # [batch], of a feature one evaluation old, None before anything was tried
        self.deep = False   # more than half of the pass was left out

    def due(self, evaluation):
        """True when `evaluation` should be run with reused features as well."""
        return evaluation.ordinal >= self.next and not evaluation.is_last

    def observe(self, evaluation, error, age, kinds):
        """Note that features of `kinds`, `age` evaluations old, gave the slope with `error` [batch].

        As those of forecasts, errors are taken to grow like the age.
        """
        self.error, self.deep = error / age, kinds <= DEEP
        self.next, self.wait = evaluation.ordinal + self.wait, self.wait * LATER
