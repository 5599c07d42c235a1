-- How did single held-out answers change? The rewards of an evaluation, round 0 (untrained) to 2.
select
    p.id,
    round(max(g.reward) filter (where g.round = 0), 4) as round_0,
    round(max(g.reward) filter (where g.round = 1), 4) as round_1,
    round(max(g.reward) filter (where g.round = 2), 4) as round_2,
    round(max(g.reward) filter (where g.round = 2) - max(g.reward) filter (where g.round = 0), 4) as gain
from grades g
join prompts p using (prompt_id)
group by p.id
order by gain desc, p.id
limit 5
----
+-----+---------+---------+---------+--------+
| id  | round_0 | round_1 | round_2 | gain   |
+-----+---------+---------+---------+--------+
| q34 | 0.0923  | 0.4392  | 0.7865  | 0.6942 |
| q2  | 0.1051  | 0.7337  | 0.6072  | 0.5021 |
| q20 | 0.4722  | 0.6469  | 0.926   | 0.4538 |
| q28 | 0.3931  | 0.2831  | 0.8249  | 0.4318 |
| q39 | 0.0492  | 0.8433  | 0.468   | 0.4188 |
+-----+---------+---------+---------+--------+
