"""Which plan runs a layer, and why: functions of sizes."""
