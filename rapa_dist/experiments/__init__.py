"""The paper's tables and figures: which runs they take, carrying them out, and what comes of them.

paper       the paper's numbers
cells       which runs and analyses an experiment needs, under which protocol
store       where they are kept, so that nothing is done twice
jobs        one run or one analysis, in a Ray task
runner      all of them, on whatever cluster there is
tables      Markdown; claims: the paper's, held against ours; figures: SVG
"""
