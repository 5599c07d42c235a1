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
| q36 | 0.1973  | 0.7574  | 0.9031  | 0.7057 |
| q35 | 0.0146  | 0.0712  | 0.6065  | 0.5919 |
| q8  | 0.2382  | 0.5329  | 0.8119  | 0.5737 |
| q13 | 0.2643  | 0.8692  | 0.7854  | 0.5211 |
| q34 | 0.4108  | 0.7886  | 0.8904  | 0.4797 |
+-----+---------+---------+---------+--------+
