-- Do the answers get better? The mean reward of every round, and how far rewards spread.
select
    round,
    count(*) as answers,
    round(avg(reward), 4) as mean,
    round(stddev(reward), 4) as spread
from rewards
group by round
order by round
----
+-------+---------+--------+--------+
| round | answers | mean   | spread |
+-------+---------+--------+--------+
| 1     | 200     | 0.5097 | 0.2861 |
| 2     | 200     | 0.482  | 0.2809 |
+-------+---------+--------+--------+
