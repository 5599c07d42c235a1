-- What was set aside, where, and why? `fault`: something is wrong with it; `dropped`: a rule said so.
select stage, round, class, reason, count(*) as n, min(id) as for_example
from rejects
group by stage, round, class, reason
order by stage, round, n desc
----
+-------+-------+---------+----------------------------------------+----+----------------------------------+
| stage | round | class   | reason                                 | n  | for_example                      |
+-------+-------+---------+----------------------------------------+----+----------------------------------+
| pairs | 1     | dropped | the rewards are closer than margin_min | 11 | 00c661b98fe122fc45da25958821c032 |
| pairs | 2     | dropped | the rewards are closer than margin_min | 16 | 04a12999d6a2b7c52a9e6f0cf297a197 |
+-------+-------+---------+----------------------------------------+----+----------------------------------+
