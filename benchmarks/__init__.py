"""Measured numbers. Each script prints JSON with commit, device, shapes and ratios taken in pairs."""
