"""The losses of this package beside others on this machine: ``cjepa bench`` (extra ``[bench]``)."""
