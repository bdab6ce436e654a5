from harness.models.dual_branch_args import DualBranchArgs as DualBranchArgs
