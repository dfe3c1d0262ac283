"""What report.py makes of the files that runs leave: tables and pictures, without torch.

- runs.py: log.txt and run.json of a run; runs that differ only in --seed as one group
- table.py: a row for each group; what keeps runs from being compared
- classes.py: a row for each class of a predictions.csv
- pictures.py: curves of groups, confusion matrix of classes
"""
