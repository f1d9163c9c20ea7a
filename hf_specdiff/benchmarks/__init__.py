"""What `hf-specdiff bench` and the doctor measure with: methods, clocks, runs, tables, pictures."""
