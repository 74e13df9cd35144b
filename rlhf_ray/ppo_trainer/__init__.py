"""PPO in one process, without Ray, by the names that scripts for TRL before 0.12 use.

    queries ─► generate ─► responses ─► your scores ─► step ─► a better policy, stats

The learner's own arithmetic does the work (``roles.ppo_update``, ``models.policy``, ``algorithms``); what stands here
is names, checks and the script's side of the loop.
"""
