"""Numbers that the device has computed, for the host to decide by."""
import torch


class Reading:
    """Reads small tensors of numbers, one after the other, during one run."""

    def __init__(self, late=False):
        """late: every reading hands out the numbers of the one before, which have long arrived. So the host never
        waits for what it has only just given the device to do."""
        self.late, self.coming = late, None

    def read(self, numbers, about):
        """Floats, and what they are about: `numbers` (tensor [n]) with `about` (anything), or those of the reading
        before; (None, None) where that was none."""
        if not self.late:
            return numbers.tolist(), about
        before, self.coming = self.coming, (*begin_copy(numbers), about)
        if before is None:
            return None, None
        copy, arrived, about = before
        if arrived is not None:
            arrived.synchronize()
        return copy.tolist(), about

    def reset(self):
        """Forget what is on its way."""
        self.coming = None


def begin_copy(numbers):
    """A copy of `numbers` in main memory that is on its way, and the event of its arrival; (copy, None) where
    there is nothing to wait for."""
    if numbers.device.type != "cuda":
        return numbers.clone(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    return copy, torch.cuda.current_stream(numbers.device).record_event()
