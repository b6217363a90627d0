"""The live proof: scenarios on emulated hosts and devices, the systems that are compared, predictions and reports."""
